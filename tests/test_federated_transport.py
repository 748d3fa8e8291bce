"""The in-process transport and aggregation: no device's fault ends a round."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxhybrid.errors import InvalidArgument, PlanMismatchError
from fxhybrid.federated.protocol.compact_updates import pack_update, unpack_update
from fxhybrid.federated.protocol.messages import Arrays, Kind, Outcome, Reply, Request
from fxhybrid.federated.protocol.model_arrays import leading_slice, load_arrays, to_arrays
from fxhybrid.federated.protocol.transport import Handler, InProcessTransport
from fxhybrid.federated.server.aggregation import Update, average, shapes_of, weight_of, why_invalid

PAYLOAD = {"n_examples": 3, "loss": 0.5, "squared_loss": 0.25}


def request(device: str) -> Request:
    return Request(device, Kind.TRAIN, 1, now_s=0.0, deadline_s=10.0)


def raising(error: Exception) -> Handler:
    def handler(request: Request) -> Reply:
        raise error

    return handler


def after(elapsed_s: float) -> Handler:
    return lambda request: Reply(request.device, request.round, Outcome.OK, elapsed_s, PAYLOAD)


def test_every_request_gets_a_typed_reply_in_order() -> None:
    handlers = {
        "good": after(9.0),
        "late": after(11.0),
        "memory": raising(MemoryError("no room")),
        "torch": raising(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")),
        "graph": raising(PlanMismatchError("another graph")),
        "broken": raising(ZeroDivisionError("division by zero")),
    }
    transport = InProcessTransport(handlers)
    replies = transport.ask([request(name) for name in [*transport.devices(), "nobody"]])
    assert [(r.device, r.outcome) for r in replies] == [
        ("good", Outcome.OK),
        ("late", Outcome.LATE),
        ("memory", Outcome.OOM),
        ("torch", Outcome.OOM),
        ("graph", Outcome.REFUSED),
        ("broken", Outcome.FAILED),
        ("nobody", Outcome.LOST),
    ]


def test_a_device_cannot_answer_for_another() -> None:
    transport = InProcessTransport({"a": lambda request: Reply("b", 7, Outcome.OK, 1.0)})
    assert (transport.ask([request("a")])[0].device, transport.ask([request("a")])[0].round) == ("a", 1)


MODEL = {"w": np.zeros((2, 2), np.float32), "n": np.array(5)}


def reply(arrays: Arrays, **payload: object) -> Reply:
    return Reply("a", 1, Outcome.OK, 1.0, {**PAYLOAD, **payload}, arrays)


def test_a_good_reply_is_valid() -> None:
    assert why_invalid(reply(MODEL), MODEL, shapes_of(MODEL)) == ""


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (reply({"w": MODEL["w"]}), "names"),
        (reply({**MODEL, "x": MODEL["w"]}), "names"),
        (reply({**MODEL, "w": np.zeros((2, 3), np.float32)}), "shape"),
        (reply({**MODEL, "w": np.zeros((2, 2), np.float64)}), "float64"),
        (reply({**MODEL, "w": np.full((2, 2), np.nan, np.float32)}), "finite"),
        (reply({**MODEL, "w": np.full((2, 2), np.inf, np.float32)}), "finite"),
        (reply({**MODEL, "w": [[0.0, 0.0], [0.0, 0.0]]}), "shape"),  # type: ignore[dict-item]
        (reply(MODEL, n_examples=0), "n_examples"),
        (reply(MODEL, n_examples=-4), "n_examples"),
        (reply(MODEL, n_examples=True), "n_examples"),
        (reply(MODEL, n_examples=1 << 60), "n_examples"),
        (reply(MODEL, n_examples=2.5), "n_examples"),
        (reply(MODEL, loss=math.nan), "loss"),
        (reply(MODEL, squared_loss="0"), "squared_loss"),
    ],
)
def test_bad_replies_are_refused_in_words(bad: Reply, word: str) -> None:
    assert word in why_invalid(bad, MODEL, shapes_of(MODEL))


def test_average_weighs_by_examples() -> None:
    # (1 * 1 + 3 * 5) / 4 = 4; the counter (1 * 2 + 3 * 3) / 4 = 2.75, rounded
    updates = [
        Update("a", {"w": np.full((2, 2), 1, np.float32), "n": np.array(2)}, 1.0),
        Update("b", {"w": np.full((2, 2), 5, np.float32), "n": np.array(3)}, 3.0),
    ]
    mean = average(MODEL, updates)
    assert mean["w"].tolist() == [[4, 4], [4, 4]]
    assert isinstance(mean["n"], np.ndarray)
    assert (mean["n"], mean["n"].dtype, mean["w"].dtype) == (3, MODEL["n"].dtype, np.float32)


def test_average_of_slices_keeps_what_nobody_trained() -> None:
    # a holds one column of two, b all of one row; the element that neither holds stays at 9
    current = {"w": np.full((2, 2), 9, np.float32)}
    updates = [
        Update("a", {"w": np.array([[2], [4]], np.float32)}, 1.0),
        Update("b", {"w": np.array([[6, 8]], np.float32)}, 1.0),
    ]
    assert average(current, updates)["w"].tolist() == [[4, 8], [4, 9]]


def test_average_of_nothing_is_the_current_model() -> None:
    assert average(MODEL, [])["w"] is MODEL["w"]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=6), st.randoms())
def test_average_does_not_depend_on_who_answered_first(values: list[float], random: object) -> None:
    updates = [Update(str(i), {"w": np.full((3,), v, np.float32)}, i + 1.0) for i, v in enumerate(values)]
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    current = {"w": np.zeros(3, np.float32)}
    mean = average(current, updates)["w"]
    assert np.array_equal(mean, average(current, shuffled)["w"])
    assert min(values) - 1e-3 <= mean[0] <= max(values) + 1e-3


def test_weights() -> None:
    assert (weight_of(reply(MODEL), "examples"), weight_of(reply(MODEL), "uniform")) == (3.0, 1.0)
    with pytest.raises(InvalidArgument, match="loudest"):
        weight_of(reply(MODEL), "loudest")


def test_bfloat16_is_widened_on_the_wire_and_narrowed_back() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    arrays = to_arrays(model)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    other = nn.Linear(3, 2).to(torch.bfloat16)
    load_arrays(other, arrays)
    assert torch.equal(other.weight, model.weight)
    assert other.weight.dtype is torch.bfloat16


def test_updates_travel_in_bytes_and_come_back_within_half_a_step() -> None:
    random = np.random.default_rng(0)
    base = {"w": random.normal(size=(4, 30)).astype(np.float32), "n": np.array(5), "s": np.float32(2.0) * np.ones(())}
    rows = np.array([[1e-6], [1.0], [100.0], [0.0]])
    trained = {"w": (base["w"] + rows * random.normal(size=(4, 30))).astype(np.float32), "n": np.array(7)}
    trained["s"] = np.asarray(base["s"] + 1, base["s"].dtype)
    packed = pack_update(trained, base)
    assert packed["w"].nbytes + packed["w//scale"].nbytes == 4 * 30 + 4 * 4  # a byte a number, a scale a row
    found = unpack_update(packed, base)
    step = np.abs(trained["w"] - base["w"]).max(1, keepdims=True) / 127
    assert (np.abs(found["w"] - trained["w"]) <= 0.5 * step + 1e-6 * np.abs(trained["w"])).all()
    assert (found["n"], found["s"], found["s"].shape) == (7, pytest.approx(3.0), ())
    assert why_invalid(reply(found), base, shapes_of(base)) == ""


def test_malformed_packed_updates_are_refused() -> None:
    base = {"w": np.zeros((2, 3), np.float32)}
    good = pack_update({"w": np.ones((2, 3), np.float32)}, base)
    for bad in ({"w": good["w"]}, {**good, "w": good["w"][:1]}, {**good, "w//scale": np.ones(3, np.float32)}):
        with pytest.raises(InvalidArgument, match="packed update"):
            unpack_update(bad, base)
    infinite = np.array([[1, np.inf, 1], [1, 1, 1]], np.float32)
    assert not np.isfinite(unpack_update(pack_update({"w": infinite}, base), base)["w"][0]).any()


def test_a_narrow_models_part_is_the_leading_slice() -> None:
    wide, narrow = {"w": np.arange(6).reshape(2, 3)}, {"w": np.zeros((1, 2))}
    assert leading_slice(wide, narrow)["w"].tolist() == [[0, 1]]


def test_arrays_are_copies() -> None:
    model = nn.Linear(1, 1)
    arrays = to_arrays(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert arrays["weight"][0, 0] != model.weight.item()


def test_flower_is_not_imported() -> None:
    names = "fxhybrid.federated.protocol.transport, fxhybrid.federated.server.aggregation"
    code = f"import sys; sys.modules['flwr'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True)
