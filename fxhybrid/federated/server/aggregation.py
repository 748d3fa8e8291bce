"""Aggregation: every reply is checked, then the models are averaged."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Array, Arrays, Reply
from fxhybrid.federated.server.device_registry import readings_of

MOST_EXAMPLES = 1 << 32  # a count above this is no count; it would drown all others
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """Holds one device's trained model and its weight in the average."""

    device: str
    arrays: Arrays
    weight: float


def shapes_of(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array."""
    return {name: array.shape for name, array in arrays.items()}


def why_invalid(reply: Reply, reference: Arrays, shapes: Shapes) -> str:
    """Says why a trained model cannot be used; empty if it can.

    Args:
        reply: a device's answer.
        reference: the global model: names and types.
        shapes: what shapes were asked for; smaller than the global model's where a device trains a part of it.
    """
    count = reply.payload.get("n_examples")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MOST_EXAMPLES:
        return f"n_examples is {count!r}"
    try:
        readings_of(reply.payload)
    except (TypeError, ValueError) as error:
        return f"no readings: {error}"
    for name in ("loss", "squared_loss"):
        value = reply.payload.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{name} is {value!r}"
    if reply.arrays.keys() != reference.keys():
        odd = sorted(reply.arrays.keys() ^ reference.keys())
        return f"array names differ: {odd[:3]}"
    for name, array in reply.arrays.items():
        if not isinstance(array, np.ndarray) or array.shape != shapes[name]:
            return f"{name} has shape {getattr(array, 'shape', None)}, not {shapes[name]}"
        if array.dtype != reference[name].dtype:
            return f"{name} is {array.dtype}, not {reference[name].dtype}"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{name} is not finite"
    return ""


def weight_of(reply: Reply, weighting: str) -> float:
    """Computes a device's weight: ``"examples"`` (FedAvg) or ``"uniform"`` (FedProx, which samples by their data).

    Raises:
        InvalidArgument: another weighting.
    """
    if weighting == "uniform":
        return 1.0
    if weighting == "examples":
        return float(reply.payload["n_examples"])
    raise InvalidArgument(f'weighting is {weighting!r}; it must be "examples" or "uniform"')


def rebased(reply: Reply, base: Arrays, current: Arrays, statistics: Collection[str]) -> Arrays:
    """Carries what a device learned on an older model over to the current one: what it changed is added.

    Args:
        reply: a valid answer.
        base: the model that the device got.
        current: the model now, in the same shapes.
        statistics: names of arrays that are no parameters. They stay the device's own: a variance may become negative
            by another model's difference.
    """

    def moved(name: str, trained: Array) -> Array:
        value = trained if name in statistics else current[name] + (trained.astype(np.float64) - base[name])
        return np.asarray(value).astype(trained.dtype)

    return {name: moved(name, trained) for name, trained in reply.arrays.items()}


def staleness_weight(rounds: int) -> float:
    """Computes how much an update counts that was made on a model of ``rounds`` rounds ago.

    It is FedBuff's 1 / sqrt(1 + s) (Nguyen et al., AISTATS 2022), but among the updates of a round: FedBuff takes it
    off the whole step, and makes up for that by a rate of the server that must be tuned.
    """
    return 1 / math.sqrt(1 + rounds)


def average(current: Arrays, updates: Sequence[Update]) -> dict[str, Array]:
    """Computes the weighted mean of the updates; where none has a value, the current one.

    An update may hold the leading slice of an array only (HeteroFL); each element is averaged over those that have
    it. Sums are taken in 64 bits in the order of the devices' names, so that the result does not depend on who
    answered first.
    """
    ordered = sorted(updates, key=lambda update: update.device)
    return {name: _mean(name, value, ordered) for name, value in current.items()} if ordered else dict(current)


def _mean(name: str, current: Array, updates: Sequence[Update]) -> Array:
    total = np.zeros(current.shape, np.float64)
    weight = np.zeros(current.shape, np.float64)
    for update in updates:
        array = update.arrays[name]
        where = tuple(slice(size) for size in array.shape)
        total[where] += update.weight * array.astype(np.float64)
        weight[where] += update.weight
    mean = np.divide(total, weight, out=current.astype(np.float64), where=weight > 0)
    if current.dtype.kind in "iu":
        mean = np.rint(mean)  # counters, such as the number of batches that a batch norm has seen
    return np.asarray(mean).astype(current.dtype)  # numpy turns what has no dimensions into scalars
