"""Clients' data: which examples each one holds, and how its batches are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxhybrid.errors import InvalidArgument
from fxhybrid.suite.sample_data import Batch

Indices = NDArray[np.int64]


class ClientData(Protocol):
    """Holds one client's local data."""

    @property
    def n_examples(self) -> int:
        """Counts the examples."""
        ...

    def batches(self, batch_size: int, seed: Sequence[int]) -> Iterator[Batch]:
        """Yields endless batches of inputs and targets, all of the same shape; the same for the same seed."""
        ...


class ArrayData:
    """Holds examples in two tensors; a client with fewer examples than a batch sees some twice in it."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        """Keeps the examples.

        Raises:
            InvalidArgument: there are none, or not as many targets as inputs.
        """
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise InvalidArgument(f"{len(inputs)} inputs and {len(targets)} targets; give one target for each input")
        self.inputs, self.targets = inputs, targets

    @property
    def n_examples(self) -> int:
        """Counts the examples."""
        return len(self.inputs)

    def batches(self, batch_size: int, seed: Sequence[int]) -> Iterator[Batch]:
        """Yields endless batches, epoch by epoch in a new order; see ``ClientData``."""
        generator = np.random.default_rng(list(seed))
        waiting: list[int] = []
        while True:
            while len(waiting) < batch_size:
                waiting += generator.permutation(len(self.inputs)).tolist()
            chosen, waiting = waiting[:batch_size], waiting[batch_size:]
            yield self.inputs[chosen], self.targets[chosen]


def from_dataset(dataset: object, inputs: str, targets: str) -> ArrayData:
    """Reads a client's share of a Hugging Face ``Dataset``, as ``flwr_datasets``' partitioners give it, too.

    Args:
        dataset: has ``with_format("torch")`` and columns.
        inputs: column of the inputs; integer images are scaled to [-1, 1].
        targets: column of the targets.

    Raises:
        InvalidArgument: it is no such data set, or lacks a column.
    """
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "column_names"):
        raise InvalidArgument(f"a {type(dataset).__name__} is no Hugging Face Dataset; use ArrayData for tensors")
    missing = {inputs, targets} - set(dataset.column_names)
    if missing:
        raise InvalidArgument(f"the data set has no column {sorted(missing)}; it has {dataset.column_names}")
    columns = dataset.with_format("torch")[:]
    x, y = (c if isinstance(c, Tensor) else torch.stack(list(c)) for c in (columns[inputs], columns[targets]))
    if x.dtype is torch.uint8:
        x = x.float() / 127.5 - 1
        x = x.unsqueeze(1) if x.dim() == 3 else x
    return ArrayData(x, y)


def dirichlet_split(labels: NDArray[np.int64], n_clients: int, alpha: float, seed: int) -> list[Indices]:
    """Splits with label skew: each class is dealt out in shares drawn from Dirichlet(``alpha``).

    A small alpha gives each client few classes, a large one equal shares. No client goes empty.
    """
    generator = np.random.default_rng([seed, 1])
    preference = generator.dirichlet(np.full(n_clients, alpha), int(labels.max()) + 1)
    return _deal(labels, preference, generator)


def capability_split(
    labels: NDArray[np.int64], is_capable: Sequence[bool], skew: float, alpha: float, seed: int
) -> list[Indices]:
    """Splits with label skew by device: weak devices hold classes that strong ones lack.

    Args:
        labels: class of each example.
        is_capable: which clients are strong.
        skew: 0 has every client draw from all classes; at 1 the first half of the classes are held by strong
            clients alone and the other half by weak ones alone.
        alpha: of the Dirichlet within each side.
        seed: of the draw.
    """
    generator = np.random.default_rng([seed, 2])
    n_classes = int(labels.max()) + 1
    strong = np.array(is_capable)
    preference = generator.dirichlet(np.full(len(strong), alpha), n_classes)
    strong_class = np.arange(n_classes) < n_classes / 2
    foreign = strong_class[:, None] != strong[None, :]
    preference = np.where(foreign, preference * (1 - skew), preference)
    preference /= np.maximum(preference.sum(1, keepdims=True), 1e-300)
    return _deal(labels, preference, generator)


def _deal(labels: NDArray[np.int64], preference: NDArray[np.float64], generator: np.random.Generator) -> list[Indices]:
    """Deals out each class by the clients' shares; who went empty gets one of the largest client's examples."""
    parts: list[list[int]] = [[] for _ in range(preference.shape[1])]
    for label, shares in enumerate(preference):
        members = generator.permutation(np.flatnonzero(labels == label))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(int)
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part += chosen.tolist()
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.array(sorted(part), dtype=np.int64) for part in parts]
