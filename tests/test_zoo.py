"""An architecture of the zoo that trains, one that does not, and a process that dies."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from torch import nn

from benchmarks.lib import zoo_trial
from benchmarks.lib.zoo_batches import MAKERS, make_batch
from benchmarks.lib.zoo_configs import build_model
from benchmarks.lib.zoo_list import ARCHITECTURES, HEADS
from benchmarks.lib.zoo_processes import records_of_all
from benchmarks.lib.zoo_results import count_rows, failure_rows, model_rows
from benchmarks.lib.zoo_trial import MAX_GRAD_ERROR, Trainee, record_of
from benchmarks.zoo import judge

pytest.importorskip("transformers")


def test_the_list_is_complete() -> None:
    assert len(ARCHITECTURES) >= 120
    assert len({a.family for a in ARCHITECTURES.values()}) >= 10
    for architecture in ARCHITECTURES.values():
        assert architecture.kind in MAKERS
        assert architecture.library != "transformers" or architecture.head or architecture.kind in HEADS


def test_one_that_works_and_one_that_does_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        works = record_of("vit")
    message = "the model cannot be traced into one graph"
    broken = {**works, "model": "longformer", "verdict": "graph break", "error": "GraphBreakError", "message": message}
    del broken["lossless"], broken["smallest"]
    assert works["verdict"] == "works"
    assert works["lossless"]["bit_equal"]
    assert works["lossless"]["eager_repeats"]
    assert works["smallest"]["gradient_error"] <= MAX_GRAD_ERROR
    for part in ("lossless", "smallest"):
        assert works[part]["peak_bytes"] <= works[part]["budget_bytes"]
    assert works["smallest"]["budget_bytes"] < works["lossless"]["budget_bytes"]
    assert [row[0] for row in model_rows([works, broken])] == ["vit"]
    assert [row[0] for row in failure_rows([works, broken])] == ["longformer"]
    # family, architectures, one graph, work, refused, several graphs, faults
    assert list(count_rows([works, broken]))[-1] == ("all", "2", "1", "1", "1", "1", "0")
    assert [check.met for check in judge([works, broken])] == [False, True, True]  # 1 of one graph, not 80


def test_a_wrong_gradient_and_a_foreign_error_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES["vit"]
    model = build_model(architecture)
    batch = make_batch(architecture, model)

    def other_weights(model: nn.Module, batch: Any, **_: Any) -> Trainee:
        changed = copy.deepcopy(model)
        next(changed.parameters()).data.mul_(1.01)
        return Trainee(changed, batch)

    expected = Trainee(copy.deepcopy(model), batch).train()
    assert Trainee(copy.deepcopy(model), batch).train().same_bits(expected)
    found = other_weights(model, batch).train()
    assert not found.same_bits(expected)
    assert min(found.errors(expected)) > 1e-5

    def fails(model: nn.Module, batch: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    record = zoo_trial.attempt(fails, model, batch)
    assert (record["verdict"], record["error"]) == ("CRASH", "ZeroDivisionError")


def test_a_process_that_dies_costs_one_architecture() -> None:
    (record,) = records_of_all(["no such architecture"], jobs=1, timeout_s=60)
    assert record["verdict"] == "CRASH"
    assert "the process died" in record["message"]
