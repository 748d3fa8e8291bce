"""Counts what stands beside a call while it runs: storages, gradients to come and optimizer state of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fxhybrid.compiler.pending_calls import PendingCall, storages_of
from fxhybrid.profiling.optimizer_step import optimizer_bytes
from fxhybrid.profiling.state_bytes import gradient_bytes


@dataclass(frozen=True, eq=False)
class Participant:
    """Holds a call's model and the bytes of its own storages, which its plan counts, by the storage's identity."""

    model: nn.Module
    storages: dict[int, int]


def beside_bytes(own: Participant, calls: Sequence[PendingCall], new: Participant | None = None) -> int:
    """Counts what stands beside a call.

    Args:
        own: the call.
        calls: the other ones that are pending.
        new: one more that has begun but holds nothing yet; None if that is the call itself.
    """
    owners = [(call.planned.model(), call.planned.optimizer) for call in calls]
    found: dict[int, int] = {}
    if new is not None:
        owners.append((new.model, None))
        found.update(new.storages)
    for call in calls:
        found.update(call.alive())
    owners = [(model, optimizer) for model, optimizer in owners if model is not None]
    others = {id(model): model for model, _ in owners if model is not None and model is not own.model}
    for other in others.values():
        found.update(storages_of([*other.parameters(), *other.buffers()]))
    optimizers = {id(o): o for model, o in owners if o is not None and model is not own.model}
    return (
        sum(n_bytes for storage, n_bytes in found.items() if storage not in own.storages)
        + sum(_tangent_bytes(call, own) for call in calls)
        + _shared_gradient_bytes(own.model, [model for model, _ in owners if model is not None])
        + sum(map(gradient_bytes, others.values()))
        + sum(optimizer_bytes(optimizer).state_bytes for optimizer in optimizers.values())
    )


def older_gradient_bytes(model: nn.Module | None) -> int:
    """Counts the gradients that exist already."""
    parameters = () if model is None else model.parameters()
    return sum(storages_of(p.grad for p in parameters if p.grad is not None).values())


def model_storages(model: nn.Module) -> dict[int, int]:
    """Maps the identity to the bytes of every storage of a model."""
    return storages_of([*model.parameters(), *model.buffers()])


def _tangent_bytes(call: PendingCall, own: Participant) -> int:
    """Counts gradients of a pending call's outputs; of one that ``own`` takes as an input, that is in own's plan."""
    passed_on = {ref.cdata: n_bytes for ref, n_bytes in call.held if ref.cdata in own.storages}
    return max(call.planned.tangent_bytes - sum(passed_on.values()), 0)


def _shared_gradient_bytes(model: nn.Module, others: Sequence[nn.Module]) -> int:
    """Counts one set of gradients of parameters that other calls share: autograd keeps it until all have arrived."""
    shared = {id(p) for other in others for p in other.parameters()}
    return sum(p.nbytes for p in model.parameters() if p.requires_grad and id(p) in shared)
