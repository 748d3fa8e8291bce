"""Aggregation: every reply is checked, then the models are averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Array, Arrays, Payload, Reply
from fxhybrid.federated.server.device_records import readings_of

LARGEST_COUNT = 1 << 32  # a count above this is no count; it would drown all others
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
    why = _why_odd(reply.payload)
    if why:
        return why
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


def _why_odd(payload: Payload) -> str:
    """Says what is wrong with what a device reports about its training; empty if nothing is."""
    for name, absent in (("n_examples", None), ("n_steps", 1)):
        count = payload.get(name, absent)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= LARGEST_COUNT:
            return f"{name} is {count!r}"
    for name in ("loss", "squared_loss"):
        value = payload.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{name} is {value!r}"
    try:
        readings_of(payload)
    except (TypeError, ValueError) as error:
        return f"no readings: {error}"
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


def kept_by_step(model: nn.Module) -> dict[str, float]:
    """Returns for each of a model's buffers the share of its value that a training step keeps.

    Running statistics of batch norm keep 1 - momentum of theirs. Of other buffers nothing is known: 0.
    """
    kept = dict.fromkeys((name for name, _ in model.named_buffers()), 0.0)
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is not None:
            kept |= {f"{prefix}.{name}".lstrip("."): 1 - module.momentum for name in ("running_mean", "running_var")}
    return kept


def rebased(reply: Reply, base: Arrays, current: Arrays, kept: Mapping[str, float]) -> Arrays:
    """Carries what a device learned on an older model over to the current one.

    What it changed of parameters is added. A running mean that keeps a share of its value in each step is what it would
    be had the device begun at the current one: adding the change could turn a variance negative.

    Args:
        reply: a valid answer; ``n_steps`` of its payload are the steps it took, one where it does not say.
        base: the model that the device got.
        current: the model now, in the same shapes.
        kept: see ``kept_by_step``; of what is not in there, all is kept.
    """
    n_steps = int(reply.payload.get("n_steps", 1))

    def moved(name: str, trained: Array) -> Array:
        difference = current[name] - base[name].astype(np.float64)
        return np.asarray(trained + kept.get(name, 1.0) ** n_steps * difference).astype(trained.dtype)

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
