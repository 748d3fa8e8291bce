"""What is trained: a model, its loss, every client's data and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxhybrid.federated.tasks.data import (
    ArrayData,
    Batch,
    ClientData,
    capability_split,
    dirichlet_split,
    library_packages,
    windows,
)
from fxhybrid.federated.tasks.models import SmallMobileNet, SmallTransformer
from fxhybrid.optional_imports import require

HELD_OUT = 0.2
TEXT_LENGTH, PACKAGE_BYTES = 32, 60_000
N_HELD_OUT_WINDOWS = 1024


@dataclass(frozen=True, eq=False)
class Task:
    """A model to train together.

    Attributes:
        name: short name.
        make_model: the model at a relative width, with the same weights at every call; 1.0 is the full one.
        loss_fn: ``loss_fn(output, target)``: the mean over the batch.
        batch_size: examples of one local step.
        learning_rate: of the local steps.
        optimizer: ``"sgd"`` or ``"adam"``; its state starts anew each round.
        clients: data by client.
        held_out: a batch that nobody trains on.
    """

    name: str
    make_model: Callable[[float], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch_size: int
    learning_rate: float
    optimizer: str
    clients: Mapping[str, ClientData]
    held_out: Batch

    def example(self) -> Batch:
        """A batch of the shape that every local step has."""
        first = next(iter(self.clients.values()))
        return next(first.batches(self.batch_size, (0,)))


def digits_task(
    n_clients: int,
    *,
    seed: int = 0,
    alpha: float = 1.0,
    is_capable: Sequence[bool] | None = None,
    skew: float = 0.0,
    batch_size: int = 32,
) -> Task:
    """scikit-learn's 8 x 8 digits on a batch-norm CNN.

    Args:
        n_clients: how many share the training images.
        seed: of the split and the initial weights.
        alpha: of the Dirichlet label skew.
        is_capable: which clients are strong devices; with ``skew``, those hold other classes than weak ones.
        skew: see ``capability_split``.
        batch_size: of a local step.

    Raises:
        InvalidArgument: scikit-learn is not installed.
    """
    data = require("sklearn.datasets", "the digits task").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    n_held_out = int(len(labels) * HELD_OUT)
    held_out, trained = order[:n_held_out], order[n_held_out:]
    images, labels, test = images[trained], labels[trained], (images[held_out], labels[held_out])
    if is_capable is None:
        parts = dirichlet_split(labels.numpy(), n_clients, alpha, seed)
    else:
        parts = capability_split(labels.numpy(), is_capable, skew, alpha, seed)
    clients = {f"client{i:04d}": ArrayData(images[part], labels[part]) for i, part in enumerate(parts)}
    return Task(
        "digits",
        lambda width: _seeded(lambda: SmallMobileNet(width), seed),
        F.cross_entropy,
        batch_size,
        0.1,
        "sgd",
        clients,
        test,
    )


def text_task(n_clients: int, *, seed: int = 0, batch_size: int = 16) -> Task:
    """Next byte of the standard library's source on a small transformer, one package per client.

    The last fifth of each package is held out.
    """
    clients, held_out = {}, []
    for name, text in library_packages(n_clients, PACKAGE_BYTES).items():
        cut = int(len(text) * (1 - HELD_OUT))
        clients[name] = windows(text[:cut], TEXT_LENGTH)
        held_out.append(windows(text[cut:], TEXT_LENGTH))
    inputs, targets = (torch.cat([getattr(part, kind) for part in held_out]) for kind in ("inputs", "targets"))
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:N_HELD_OUT_WINDOWS]
    return Task(
        "text",
        lambda width: _seeded(lambda: SmallTransformer(width, length=TEXT_LENGTH), seed),
        next_byte_loss,
        batch_size,
        5e-3,
        "adam",
        clients,
        (inputs[chosen], targets[chosen]),
    )


def next_byte_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over all positions; logits (batch, length, 256), target (batch, length)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@dataclass(frozen=True)
class Score:
    """How good a model is on held-out data."""

    loss: float
    accuracy: float


def evaluate(task: Task, model: nn.Module) -> Score:
    """Loss and share of right predictions on the held-out batch, in evaluation mode."""
    inputs, targets = task.held_out
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(inputs)
        loss = float(task.loss_fn(output, targets))
        right = output.argmax(-1) == targets
    model.train(was_training)
    return Score(loss if np.isfinite(loss) else float("inf"), float(right.float().mean()))
