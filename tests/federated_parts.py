"""What the tests of the federated layer share: a tiny task, plain selectors and forecasters, simulated devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.memory.forecast import LastReading
from fxhybrid.federated.protocol.messages import Arrays, Kind, Outcome, Reply, Request
from fxhybrid.federated.protocol.transport import InProcessTransport
from fxhybrid.federated.selection.candidates import Candidate, Selection
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.server.round_plans import Fleet
from fxhybrid.federated.server.scheduler import Scheduler
from fxhybrid.federated.tasks.data import ArrayData
from fxhybrid.federated.tasks.tasks import Score, Task

N_CLASSES, N_FEATURES, BATCH = 4, 16, 64
PLENTY = 1 << 40


def tiny_task(n_clients: int = 4, layers: int = 4) -> Task:
    """Four blobs of points on a small network of GELU layers."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(N_CLASSES, N_FEATURES, generator=generator) * 2
    labels = torch.arange(64 * (n_clients + 1)) % N_CLASSES
    points = centres[labels] + torch.randn(len(labels), N_FEATURES, generator=generator)
    parts = list(zip(points.split(64), labels.split(64), strict=True))

    def make_model(width: float) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            n = int(64 * width)
            hidden = [m for i in range(layers) for m in (nn.Linear(n if i else N_FEATURES, n), nn.GELU())]
            return nn.Sequential(*hidden, nn.Linear(n, N_CLASSES))

    clients = {f"client{i}": ArrayData(*part) for i, part in enumerate(parts[:-1])}
    return Task("tiny", make_model, F.cross_entropy, BATCH, 0.5, "sgd", clients, parts[-1])


def in_order(candidates: Sequence[Candidate], count: int, *, round_index: int, seed: int = 0) -> Selection:
    """Chooses devices in turn."""
    names = [c.client for c in candidates]
    chosen = [names[((round_index - 1) * count + i) % len(names)] for i in range(min(count, len(names)))]
    return Selection(round_index, tuple(chosen), {n: {"score": 1.0, "chosen": float(n in chosen)} for n in names})


def report(request: Request, readings: list[list[float]], **payload: Any) -> Reply:
    """A device's report."""
    own = {"n_examples": 10, "bytes_per_s": 1e6, "profile": DeviceProfile().to_json(), "readings": readings}
    return Reply(request.device, request.round, Outcome.OK, 0.0, {**own, **payload})


Trained = Callable[[Request], Reply]


def adds_one(request: Request) -> Reply:
    """Training that adds 1 to every number, in 10 s."""
    arrays = {name: (array + 1).astype(array.dtype) for name, array in request.arrays.items()}
    payload = {"n_examples": 10, "loss": 1.0, "squared_loss": 1.0}
    return Reply(request.device, request.round, Outcome.OK, 10.0, payload, arrays)


def device(train: Trained = adds_one, available_bytes: int = PLENTY) -> Callable[[Request], Reply]:
    """A simulated device that reports steady memory."""

    def handler(request: Request) -> Reply:
        if request.kind is Kind.REPORT:
            return report(request, [[request.now_s, available_bytes]])
        return train(request)

    return handler


def driver_of(
    planner: FleetPlanner,
    handlers: dict[str, Callable[[Request], Reply]],
    *,
    rounds: int = 3,
    policy: Policy | None = None,
    log: Path | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Driver:
    """A driver over simulated devices; the model is one array of zeros, its score its first number."""
    arrays: Arrays = {"w": np.zeros(3, np.float32)}
    chosen = {"devices_per_round": 2, "deadline_s": 100.0, "over_selection": 1.0, **settings}
    return Driver(
        InProcessTransport(handlers),
        Scheduler(
            Fleet({1.0: planner}, {1.0: arrays}),
            policy=policy or Policy("test", forecast="last"),
            settings=Settings(rounds, **chosen),
            forecaster=LastReading(),
            select=in_order,
        ),
        arrays,
        evaluate=lambda model: Score(0.0, float(model["w"][0])),
        of={},
        log=log,
        checkpoint=checkpoint,
    )
