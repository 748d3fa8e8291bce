"""Training tasks: a model, its loss, every client's data and held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxhybrid.federated.tasks.data import ArrayData, ClientData, capability_split, dirichlet_split
from fxhybrid.suite.sample_data import (
    HELD_OUT_SHARE,
    Batch,
    consecutive_windows,
    library_packages,
    load_digits,
    split_held_out,
)
from fxhybrid.suite.small_models import SmallMobileNet, evaluate, nested_transformer, next_byte_loss, seeded

ALPHA = 1.0  # of the digits' Dirichlet label skew
TEXT_LENGTH, PACKAGE_BYTES = 32, 60_000
N_HELD_OUT_WINDOWS = 1024


@dataclass(frozen=True, eq=False)
class Task:
    """Holds a model to train together.

    Attributes:
        name: short name.
        make_model: the model at a relative width, with the same weights at every call; 1.0 is the full one.
        loss_fn: ``loss_fn(output, target)``: the mean over the batch.
        batch_size: examples of one local step.
        learning_rate: of the local steps.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adam8bit"``; its state is fresh in each round.
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
        """Draws a batch of the shape that every local step has."""
        first = next(iter(self.clients.values()))
        return next(first.batches(self.batch_size, (0,)))


def digits_task(
    n_clients: int,
    *,
    seed: int = 0,
    is_capable: Sequence[bool] | None = None,
    skew: float = 0.0,
) -> Task:
    """Makes the task of a batch-norm CNN on scikit-learn's 8 x 8 digits.

    Args:
        n_clients: how many share the training images.
        seed: of the split and the initial weights.
        is_capable: which clients are strong devices; with ``skew``, those hold other classes than weak ones.
        skew: see ``capability_split``.

    Raises:
        InvalidArgument: scikit-learn is not installed.
    """
    images, labels = load_digits("the digits task")
    trained, held_out = split_held_out(len(labels))
    images, labels, test = images[trained], labels[trained], (images[held_out], labels[held_out])
    if is_capable is None:
        parts = dirichlet_split(labels.numpy(), n_clients, ALPHA, seed)
    else:
        parts = capability_split(labels.numpy(), is_capable, skew, ALPHA, seed)
    clients = {f"client{i:04d}": ArrayData(images[part], labels[part]) for i, part in enumerate(parts)}
    return Task(
        "digits",
        lambda width: seeded(lambda: SmallMobileNet(width), seed),
        F.cross_entropy,
        32,
        0.1,
        "sgd",
        clients,
        test,
    )


def text_task(n_clients: int, *, seed: int = 0) -> Task:
    """Makes the task of a small transformer on the standard library's source, one package per client.

    The last fifth of each package is held out.
    """
    clients, held_out = held_out_windows(library_packages(n_clients, PACKAGE_BYTES), TEXT_LENGTH)
    return Task(
        "text",
        lambda width: seeded(lambda: nested_transformer(width, length=TEXT_LENGTH), seed),
        next_byte_loss,
        16,
        5e-3,
        "adam",
        clients,
        held_out,
    )


def held_out_windows(texts: Mapping[str, bytes], length: int) -> tuple[dict[str, ClientData], Batch]:
    """Cuts each client's text into windows; the last fifth of each text is held out, and some windows of it kept."""
    clients: dict[str, ClientData] = {}
    held_out = []
    for name, text in texts.items():
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        clients[name] = ArrayData(*consecutive_windows(text[:cut], length))
        held_out.append(consecutive_windows(text[cut:], length))
    inputs, targets = (torch.cat(part) for part in zip(*held_out, strict=True))
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:N_HELD_OUT_WINDOWS]
    return clients, (inputs[chosen], targets[chosen])


@dataclass(frozen=True)
class Score:
    """Says how good a model is on held-out data."""

    loss: float
    accuracy: float


def score_model(task: Task, model: nn.Module) -> Score:
    """Computes loss and accuracy on the held-out batch; a loss that is not finite counts as inf."""
    found = evaluate(model, task.loss_fn, [task.held_out])
    return Score(found.loss if math.isfinite(found.loss) else math.inf, found.accuracy)
