"""Flower: the same driver over a Grid in this process, and over a real SuperLink with SuperNodes on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the extra: pip install 'fxhybrid[federated]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fxhybrid.federated.flower import FlowerTransport, decode_request, encode_request
from fxhybrid.federated.messages import Kind, Outcome, Request

APP = Path(__file__).parents[1] / "fxhybrid" / "federated" / "flower_app"
Answer = Callable[[Message], "Message | None"]


class LocalGrid:
    """A Grid whose nodes are functions; messages go through their byte form, errors as Flower's own."""

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
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = name
                self.waiting[name] = reply
            names.append(name)
        return names

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.waiting.pop(name) for name in names if name in self.waiting]


def echo(message: Message) -> Message:
    request = decode_request(message, Kind.TRAIN)
    facts = {"n_examples": 1, "loss": 0.0, "squared_loss": 0.0}
    told = {"outcome": "ok", "detail": "", "facts": facts}
    arrays = ArrayRecord({name: Array(np.asarray(array + 1)) for name, array in request.arrays.items()})
    return Message(RecordDict({"facts": ConfigRecord({"json": json.dumps(told)}), "arrays": arrays}), reply_to=message)


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
    requests = [Request(name, Kind.TRAIN, 3, 0.0, 9.0, {"mu": 0.5}, arrays) for name in transport.devices()]
    replies = transport.ask(requests, 0.2)
    assert [r.outcome for r in replies] == [
        Outcome.OK,
        Outcome.OOM,
        Outcome.REFUSED,
        Outcome.LOST,
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
    transport.ask([sent], 1.0)
    assert (got[0].device, got[0].facts, got[0].round, got[0].deadline_s) == ("11", sent.facts, 2, 60.0)
    assert got[0].arrays["w"].tolist() == [0, 1, 2]
    assert encode_request(sent)["arrays"]["w"].numpy().tolist() == [0, 1, 2]


class Silent(LocalGrid):
    """A SuperLink that cannot be reached."""

    def push_messages(self, messages: list[Message]) -> list[str]:
        raise ConnectionError("refused")


def test_a_superlink_out_of_reach_loses_requests_and_nothing_else() -> None:
    transport = FlowerTransport(Silent({11: echo}), poll_s=0.01)  # type: ignore[arg-type]
    requests = [Request(name, Kind.REPORT, 1, 0.0, 9.0) for name in transport.devices()]
    assert [r.outcome for r in transport.ask(requests, 0.2)] == [Outcome.LOST]


# -- a real deployment on loopback ---------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Deployment:
    """One SuperLink and two SuperNodes as processes of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{APP.parents[2]}:{os.environ.get('PYTHONPATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def superlink(self) -> None:
        self.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port))

    def supernode(self, partition: int, **config: int) -> None:
        own = {"partition-id": partition, "num-partitions": 2, **config}
        told = " ".join(f"{name}={value}" for name, value in own.items())
        address = f"127.0.0.1:{self.port}"
        self.start(
            *("flower-supernode", "--insecure", "--superlink", address, "--host", "127.0.0.1"),
            *("--port", str(free_port()), "--max-retries", "20", "--node-config", told),
        )

    def run(self, limit_s: float, **config: Any) -> dict[str, Any]:
        out = self.folder / "out.json"
        told = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in {**config, "out": str(out)}.items())
        command = ["flwr", "run", str(APP), "here", "--run-config", told]
        end = time.monotonic() + limit_s
        while subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True).returncode:
            assert time.monotonic() < end, "flwr run does not start"
            time.sleep(1)
        while not out.exists():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.3)
        time.sleep(0.2)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    yield made
    made.stop()


@pytest.mark.slow
def test_two_rounds_on_loopback(deployment: Deployment) -> None:
    deployment.superlink()
    time.sleep(3)
    deployment.supernode(0)
    deployment.supernode(1, **{"budget-bytes": 5_000_000, "hard-guard": 1})  # cannot hold the unmodified step
    folder = deployment.folder / "run"
    found = deployment.run(170, num_server_rounds=2, folder=str(folder))
    assert found["rounds"] == 2
    assert found["outcomes"] == {"ok": 4}, deployment.logs()
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    peaks = sorted(reply["peak_bytes"] for reply in lines[1]["replies"].values())
    assert peaks[0] <= 5_000_000 < peaks[1]


@pytest.mark.slow
def test_a_client_that_is_killed_costs_its_own_update_only(deployment: Deployment) -> None:
    deployment.superlink()
    time.sleep(3)
    deployment.supernode(0)
    deployment.supernode(1)
    folder = deployment.folder / "run"
    log = folder / "rounds.jsonl"

    def kill_after_the_first_round() -> None:
        end = time.monotonic() + 150
        while not log.exists() and time.monotonic() < end:
            time.sleep(0.3)
        deployment.processes[2].kill()

    watcher = threading.Thread(target=kill_after_the_first_round)
    watcher.start()
    found = deployment.run(250, num_server_rounds=3, folder=str(folder), report_deadline_s=20.0, deadline_s=60.0)
    watcher.join()
    assert found["rounds"] == 3
    assert found["outcomes"]["ok"] >= 4, deployment.logs()  # two in the first round, then one in each


CERTIFICATES = """set -e
openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -sha256 -days 2 -subj /CN=test -out ca.crt \\
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
openssl ecparam -name prime256v1 -genkey -noout -out server.key
openssl req -new -key server.key -subj /CN=localhost -out server.csr
printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\nextendedKeyUsage=serverAuth\\n' > ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -sha256 -extfile ext -out server.pem
for i in 0 1 2; do ssh-keygen -q -t ecdsa -b 384 -N "" -f node$i; done
"""


class TlsDeployment(Deployment):
    """The same with certificates and registered node keys."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        subprocess.run(["bash", "-c", CERTIFICATES], cwd=folder, check=True, capture_output=True)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

    def superlink(self) -> None:
        files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
        options = [text for pair in files.items() for text in pair]
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.start("flower-superlink", *options, "--enable-supernode-auth", *where)

    def supernode(self, partition: int, **config: int) -> None:
        key = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", f"node{partition}"]
        where = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        told = f"partition-id={partition} num-partitions=2"
        self.start("flower-supernode", *key, *where, "--max-retries", "20", "--node-config", told)


@pytest.mark.slow
def test_tls_with_keys_and_an_unregistered_node(tmp_path: Path) -> None:
    deployment = TlsDeployment(tmp_path)
    try:
        deployment.superlink()
        time.sleep(4)
        for partition in (0, 1):
            register = ["flwr", "supernode", "register", f"node{partition}.pub", "here"]
            subprocess.run(register, env=deployment.environment, cwd=tmp_path, check=True, capture_output=True)
            deployment.supernode(partition)
        deployment.supernode(2)
        stranger = deployment.processes[-1]
        assert stranger.wait(60) != 0, "a node without a registered key must be turned away"
        assert deployment.run(170, num_server_rounds=1)["outcomes"] == {"ok": 2}, deployment.logs()
    finally:
        deployment.stop()
