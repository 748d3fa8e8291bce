"""Flower within this process: the driver over a Grid whose nodes are functions."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'fxhybrid[federated]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from fxhybrid.federated.flower.grid_transport import FlowerTransport
from fxhybrid.federated.flower.records import decode_request, encode_request
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.server.policies import Policy
from fxhybrid.federated.tasks.captured_step import capture_step
from tests.federated_parts import Trained, adds_one, device, driver_of, tiny_task

Answer = Callable[[Message], "Message | None"]

REPORT = """
import sys
import fxhybrid.federated.flower.client_mod
import fxhybrid.federated.flower.node_app
from fxhybrid.federated.client.node import Node
from fxhybrid.federated.protocol.messages import Kind, Request
node = Node({"partition-id": 0, "num-partitions": 2}, {"task": "text", "seed": 0})
print(node.answer(Request("a", Kind.REPORT, 1, 0.0, 60.0, {"introduce": True})).outcome.value)
print([name for name in sys.modules if name in ("torch._dynamo", "fxhybrid.api", "fxhybrid.federated.server")])
"""


class LocalGrid:
    """A Grid whose nodes are functions; content goes through its byte form, errors are Flower's own."""

    def __init__(self, nodes: dict[int, Answer]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = nodes
        self.waiting: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def create_message(
        self, content: RecordDict, kind: str, node: int, group: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id=node, message_type=kind, group_id=group, ttl=ttl)

    def push_messages(self, messages: list[Message]) -> list[str]:
        names = []
        for number, message in enumerate(messages):
            name = f"m{len(self.waiting)}-{number}"
            message.metadata.__dict__["_message_id"] = name
            message.content = through_bytes(message.content)
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                if reply.has_content():
                    reply.content = through_bytes(reply.content)
                reply.metadata.__dict__["_reply_to_message_id"] = name
                self.waiting[name] = reply
            names.append(name)
        return names

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.waiting.pop(name) for name in names if name in self.waiting]


def through_bytes(content: RecordDict) -> RecordDict:
    """As the other side gets it."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def echo(message: Message) -> Message:
    request = decode_request(message, Kind.TRAIN)
    payload = {"n_examples": 1, "loss": 0.0, "squared_loss": 0.0}
    told = {"outcome": "ok", "detail": "", "payload": payload}
    arrays = ArrayRecord({name: Array(np.asarray(array + 1)) for name, array in request.arrays.items()})
    return Message(
        RecordDict({"payload": ConfigRecord({"json": json.dumps(told)}), "arrays": arrays}), reply_to=message
    )


def error(code: int, reason: str) -> Answer:
    return lambda message: Message(Error(code=code, reason=reason), reply_to=message)


def test_every_way_to_fail_is_a_typed_reply() -> None:
    nodes: dict[int, Answer] = {
        11: echo,
        12: error(2, "<class 'MemoryError'>:<'no room'>"),
        13: error(2, "<class 'fxhybrid.errors.PlanMismatchError'>:<'another graph'>"),
        14: error(8, "ClientApp stopped responding."),
        15: error(5, "Node Unavailable"),
        16: error(2, "<class 'KeyError'>:<'x'>"),
        17: lambda message: None,
        18: lambda message: Message(RecordDict({"other": ConfigRecord({"a": 1})}), reply_to=message),
    }
    transport = FlowerTransport(LocalGrid(nodes), poll_s=0.01)  # type: ignore[arg-type]
    arrays = {"w": np.zeros((2, 2), np.float32), "n": np.array(4)}
    requests = [Request(name, Kind.TRAIN, 3, 0.0, 0.2, {"mu": 0.5}, arrays) for name in transport.devices()]
    replies = transport.ask(requests)
    assert [r.outcome for r in replies] == [
        Outcome.OK,
        Outcome.OOM,
        Outcome.REFUSED,
        Outcome.KILLED,
        Outcome.LOST,
        Outcome.FAILED,
        Outcome.LATE,
        Outcome.INVALID,
    ]
    assert replies[0].arrays["w"].tolist() == [[1, 1], [1, 1]]
    assert (replies[0].arrays["n"], replies[0].arrays["n"].shape) == (5, ())
    assert [r.round for r in replies] == [3] * 8


def test_requests_survive_the_wire() -> None:
    sent = Request("11", Kind.TRAIN, 2, 5.0, 60.0, {"plans": ["{}"], "seed": [1, 2]}, {"w": np.arange(3.0)})
    got: list[Request] = []

    def noting(message: Message) -> Message:
        got.append(decode_request(message, Kind.TRAIN))
        return echo(message)

    transport = FlowerTransport(LocalGrid({11: noting}), poll_s=0.01)  # type: ignore[arg-type]
    transport.devices()
    transport.ask([sent])
    assert (got[0].device, got[0].payload, got[0].round, got[0].deadline_s) == ("11", sent.payload, 2, 60.0)
    assert got[0].arrays["w"].tolist() == [0, 1, 2]
    assert encode_request(sent)["arrays"]["w"].numpy().tolist() == [0, 1, 2]


class Silent(LocalGrid):
    """A SuperLink that cannot be reached."""

    def push_messages(self, messages: list[Message]) -> list[str]:
        raise ConnectionError("refused")


def test_a_superlink_out_of_reach_loses_requests_and_nothing_else() -> None:
    transport = FlowerTransport(Silent({11: echo}), poll_s=0.01)  # type: ignore[arg-type]
    requests = [Request(name, Kind.REPORT, 1, 0.0, 9.0) for name in transport.devices()]
    assert [r.outcome for r in transport.ask(requests)] == [Outcome.LOST]


def node(train: Trained = adds_one) -> Answer:
    """A simulated device behind Flower's messages; its errors are Flower's, its silence is None."""

    def answer(message: Message) -> Message | None:
        kind = Kind.TRAIN if message.metadata.message_type == "train" else Kind.REPORT
        try:
            reply = device(train)(decode_request(message, kind))
        except MemoryError as failure:
            return Message(Error(code=2, reason=f"{type(failure)}:<{failure}>"), reply_to=message)
        except TimeoutError:
            return None
        told = {"outcome": reply.outcome.value, "detail": reply.detail, "payload": dict(reply.payload)}
        arrays = ArrayRecord({name: Array(array) for name, array in reply.arrays.items()})
        return Message(
            RecordDict({"payload": ConfigRecord({"json": json.dumps(told)}), "arrays": arrays}), reply_to=message
        )

    return answer


def raising(failure: Exception) -> Trained:
    def train(request: Request) -> Reply:
        raise failure

    return train


def changed(array: np.ndarray) -> Trained:
    return lambda request: dataclasses.replace(adds_one(request), arrays={"w": array})


def test_bad_replies_lose_no_round_and_do_not_touch_the_model() -> None:
    planner = FleetPlanner.of(capture_step(tiny_task())[1])
    nodes = {
        1: node(),
        2: node(raising(MemoryError("no room"))),
        3: node(changed(np.full(3, np.nan, np.float32))),
        4: node(changed(np.ones(4, np.float32))),
        5: node(raising(TimeoutError())),
    }
    open_policy = Policy("open", forecast="last", gate=False)  # with the gate, whoever failed twice would rest
    driver = driver_of(planner, {}, rounds=3, policy=open_policy, devices_per_round=5, deadline_s=0.5)
    driver.transport = FlowerTransport(LocalGrid(nodes), poll_s=0.01)  # type: ignore[arg-type]
    records = driver.run()
    outcomes = {"1": "ok", "2": "oom", "3": "invalid", "4": "invalid", "5": "late"}
    assert [record.outcomes for record in records] == [outcomes] * 3
    assert driver.arrays["w"].tolist() == [3, 3, 3]  # the good node adds 1 in every round


def test_a_device_reports_without_torchs_compiler() -> None:
    # every message starts a process; the compiler takes two seconds of it, which only training needs
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["ok", "[]"], done.stderr
