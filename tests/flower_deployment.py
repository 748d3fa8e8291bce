"""A SuperLink and SuperNodes as processes of a test, on loopback; plain, or with TLS and keys of the nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

APP = Path(__file__).parents[1] / "fxhybrid" / "federated" / "flower_app"
N_PARTITIONS = 2
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(condition: Callable[[], bool], limit_s: float, told: Callable[[], str]) -> None:
    """Looks every 0.2 s; fails with what ``told`` says after the limit."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.2)


class Deployment:
    """Use as a context: leaving it ends the processes."""

    connection = "insecure = true"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.app = APP
        home = folder / "flwr"
        home.mkdir()
        where = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
        (home / "config.toml").write_text(f"{where}{self.connection.format(folder=folder)}\n")
        self.environment = {
            **os.environ,
            **QUIET,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{APP.parents[2]}:{os.environ.get('PYTHONPATH', '')}",
            "FLWR_HOME": str(home),
        }

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()

    # -- processes ----------------------------------------------------------------------------------------

    def start(self, name: str, *command: str) -> None:
        """Starts a process, or the next one of that name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            own = {"env": self.environment, "cwd": self.folder, "stdout": log, "stderr": log}
            self.processes[name] = subprocess.Popen(command, **own)

    def superlink(self, *options: str) -> None:
        """Starts the SuperLink and returns when it listens."""
        where = ("--host", "127.0.0.1", "--port", str(self.port))
        self.start("superlink", "flower-superlink", *self.link_options(), *where, *options)
        wait_for(self._is_up, 60, self.logs)

    def supernode(self, partition: int, **config: int) -> None:
        """Starts the SuperNode of one partition."""
        own = {"partition-id": partition, "num-partitions": N_PARTITIONS, **config}
        told = " ".join(f"{name.replace('_', '-')}={value}" for name, value in own.items())
        where = ("--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port()))
        rest = ("--max-retries", "40", "--node-config", told)
        self.start(f"node{partition}", "flower-supernode", *self.node_options(partition), *where, *rest)

    def kill(self, name: str) -> None:
        """Ends a process as the kernel does it when memory runs out."""
        self.processes[name].kill()
        self.processes[name].wait()

    def link_options(self) -> tuple[str, ...]:
        """Of the SuperLink's connection."""
        return ("--insecure",)

    def node_options(self, partition: int) -> tuple[str, ...]:
        """Of a SuperNode's connection."""
        return ("--insecure",)

    def health(self) -> tuple[str, ssl.SSLContext | None]:
        """Where the SuperLink says that it listens."""
        return f"http://127.0.0.1:{self.port}/health", None

    def _is_up(self) -> bool:
        url, context = self.health()
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):
                return True
        except OSError:
            return False

    # -- runs ---------------------------------------------------------------------------------------------

    def start_run(self, **config: Any) -> None:
        """Hands the app in; values are those of the run configuration."""
        told = {**config, "out": str(self.folder / "out.json"), "folder": str(self.folder / "run")}
        text = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in told.items())
        command = ["flwr", "run", str(self.app), "here", "--run-config", text]

        def is_taken() -> bool:
            self.answer = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
            return self.answer.returncode == 0

        wait_for(is_taken, 60, lambda: f"{self.answer.stdout}{self.answer.stderr}{self.logs()}")

    def result(self, limit_s: float) -> dict[str, Any]:
        """What the run wrote at its end."""
        out = self.folder / "out.json"
        wait_for(lambda: out.exists() and out.read_text().endswith("}"), limit_s, self.logs)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    def rounds(self) -> list[dict[str, Any]]:
        """The log's lines of finished rounds."""
        log = self.folder / "run" / "rounds.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def wait_for_round(self, number: int, limit_s: float) -> None:
        """Returns when so many rounds are finished."""
        wait_for(lambda: len(self.rounds()) >= number, limit_s, self.logs)

    def with_client(self, source: str) -> None:
        """Replaces the devices' app."""
        self.app = self.folder / "app"
        shutil.copytree(APP, self.app, ignore=shutil.ignore_patterns("__pycache__"))
        (self.app / "fxhybrid_app" / "client_app.py").write_text(source)

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log"))
        )


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
    """The same with certificates; nodes must be registered by their keys."""

    connection = 'root-certificates = "{folder}/ca.crt"'

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        subprocess.run(["bash", "-c", CERTIFICATES], cwd=folder, check=True, capture_output=True)

    def link_options(self) -> tuple[str, ...]:
        files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
        return (*(text for pair in files.items() for text in pair), "--enable-supernode-auth")

    def node_options(self, partition: int) -> tuple[str, ...]:
        return ("--root-certificates", "ca.crt", "--auth-supernode-private-key", f"node{partition}")

    def health(self) -> tuple[str, ssl.SSLContext | None]:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        return f"https://127.0.0.1:{self.port}/health", context

    def register(self, partition: int) -> None:
        """Makes a node's key known; before the node starts."""
        command = ["flwr", "supernode", "register", f"node{partition}.pub", "here"]
        subprocess.run(command, env=self.environment, cwd=self.folder, check=True, capture_output=True)
