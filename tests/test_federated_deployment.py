"""Flower's own processes on loopback: rounds, devices and servers that die, TLS. Those marked slow take minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'fxhybrid[federated]'")

from tests.flower_deployment import Deployment, TlsDeployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path) as made:
        yield made


def test_two_rounds_with_a_device_that_cannot_hold_the_unmodified_step(deployment: Deployment) -> None:
    deployment.superlink()
    deployment.supernode(0)
    deployment.supernode(1, budget_bytes=5_000_000, hard_guard=1)
    deployment.start_run(num_server_rounds=2)
    assert deployment.result(240) | {"accuracy": 0} == {"rounds": 2, "outcomes": {"ok": 4}, "accuracy": 0}
    peaks = sorted(reply["peak_bytes"] for reply in deployment.rounds()[1]["replies"].values())
    assert peaks[0] <= 5_000_000 < peaks[1]


@pytest.mark.slow
def test_a_node_that_is_killed_costs_its_own_updates_only(deployment: Deployment) -> None:
    deployment.superlink()
    deployment.supernode(0)
    deployment.supernode(1)
    deployment.start_run(num_server_rounds=3)
    deployment.wait_for_round(1, 300)
    deployment.kill("node1")
    found = deployment.result(400)
    assert found["rounds"] == 3
    assert found["outcomes"]["ok"] >= 4, deployment.logs()  # two in the first round, then one in each: it is noticed


BAD = """
import numpy as np

from fxhybrid.federated.flower.node_app import make_client_app
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply
from fxhybrid.federated.client.node import Node


class Bad(Node):
    def answer(self, request):
        if request.kind is Kind.REPORT or self.node_config["partition-id"] == 0:
            return super().answer(request)
        if request.round == 1:
            raise MemoryError("no room")
        arrays = {name: a * np.nan if a.dtype.kind == "f" else a for name, a in request.arrays.items()}
        if request.round == 3:
            arrays = {name: np.zeros((7, 7), np.float32) for name in arrays}
        payload = {"n_examples": 1, "loss": 1.0, "squared_loss": 1.0}
        return Reply(request.device, request.round, Outcome.OK, 0.0, payload, arrays)


app = make_client_app(Bad)
"""


@pytest.mark.slow
def test_bad_replies_lose_no_round(deployment: Deployment) -> None:
    deployment.with_client(BAD)
    deployment.superlink()
    deployment.supernode(0)
    deployment.supernode(1)
    deployment.start_run(num_server_rounds=3, policy="random")  # with the gate, a device that failed twice rests
    assert deployment.result(400)["rounds"] == 3
    outcomes = [sorted(reply["outcome"] for reply in line["replies"].values()) for line in deployment.rounds()]
    assert outcomes == [["ok", "oom"], ["invalid", "ok"], ["invalid", "ok"]], deployment.logs()


@pytest.mark.slow
def test_a_superlink_that_starts_again_loses_no_finished_round(deployment: Deployment) -> None:
    database = ("--database", str(deployment.folder / "state.db"))
    deployment.superlink(*database)
    deployment.supernode(0)
    deployment.supernode(1)
    deployment.start_run(num_server_rounds=3)
    deployment.wait_for_round(1, 300)
    deployment.kill("superlink")
    before = deployment.rounds()
    deployment.superlink(*database)
    deployment.start_run(num_server_rounds=3, resume=True)
    assert deployment.result(400)["rounds"] == 3, deployment.logs()
    after = deployment.rounds()
    assert [line["round"] for line in after] == [1, 2, 3]
    assert after[: len(before)] == before
    assert set(after[2]["replies"]) == set(before[0]["replies"])  # the same nodes, under the same names


@pytest.mark.slow
def test_tls_with_keys_turns_away_a_node_that_is_not_registered(tmp_path: Path) -> None:
    with TlsDeployment(tmp_path) as deployment:
        deployment.superlink()
        for partition in (0, 1):
            deployment.register(partition)
            deployment.supernode(partition)
        deployment.supernode(2)
        assert deployment.processes["node2"].wait(60) != 0
        deployment.start_run(num_server_rounds=1)
        assert deployment.result(400)["outcomes"] == {"ok": 2}, deployment.logs()
