"""What is trained: two moons, told apart by a small network."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fxhybrid.federated.tasks.data import ArrayData
from fxhybrid.federated.tasks.tasks import Task


def points(client: int, count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """One client's points: each moon is half a circle."""
    generator = torch.Generator().manual_seed(client)
    labels = torch.randint(0, 2, (count,), generator=generator)
    angle = torch.pi * torch.rand(count, generator=generator)
    sign = 1.0 - 2.0 * labels
    moon = torch.stack([torch.cos(angle) * sign + labels, torch.sin(angle) * sign + 0.5 * labels], 1)
    return moon + 0.1 * torch.randn(count, 2, generator=generator), labels


def make_model() -> nn.Module:
    """The same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.GELU())]
        return nn.Sequential(nn.Linear(2, 64), nn.GELU(), *hidden, nn.Linear(64, 2))


def make_task(n_clients: int, *, seed: int = 0) -> Task:
    """What server and devices train; ``fxhybrid`` calls it by the name ``guest_app.task:make_task``."""
    clients = {f"client{i}": ArrayData(*points(seed + i)) for i in range(n_clients)}
    return Task("moons", lambda width: make_model(), F.cross_entropy, 64, 0.5, "sgd", clients, points(1000))
