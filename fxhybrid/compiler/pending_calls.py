"""Calls of hybrid modules whose backward pass has not run yet, and the bytes that they hold.

A step may call modules several times before one backward pass. Each call's own plan knows nothing of what the others
hold, so every call is entered here until its backward pass has run or its outputs are dropped. Calls of another thread
or device belong to another step and are left out.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import ReferenceType, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.capture.capture import Capture
from fxhybrid.ir.plan import Actions
from fxhybrid.solvers.portfolio.known_plans import KnownPlans
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes


@dataclass(frozen=True, eq=False)
class PlannedCall:
    """Holds what is known of all calls by one plan.

    Attributes:
        model: the user's.
        optimizer: the one whose state counts against the budget.
        capture: the signature.
        budget_bytes: limit of the peak.
        pending_bytes: what other calls held when it was planned.
        tangent_bytes: gradients of the outputs.
        chosen: what the plan needs.
        plans: that were known.
    """

    model: ReferenceType[nn.Module]
    optimizer: torch.optim.Optimizer | None
    capture: Capture
    budget_bytes: int
    pending_bytes: int
    tangent_bytes: int
    chosen: PlanBytes
    plans: KnownPlans

    def opened(
        self, inputs: Iterable[Tensor], held: References = (), saved: Sequence[Callable[[], Tensor | None]] = ()
    ) -> PendingCall:
        """Enters a call; it stays entered while the result lives.

        Args:
            inputs: what the call is given.
            held: the storages that it holds.
            saved: refers to tensors that are saved for its backward pass; looked at when another call asks.
        """
        call = PendingCall(self, threading.get_ident(), len(pending_calls()), references(inputs), held, saved)
        with _LOCK:
            _CALLS[next(_SERIAL)] = call
        return call


References = tuple[tuple[StorageWeakRef, int], ...]


class Shrinks(Protocol):
    """Is a pending call that may let go of what it stored."""

    def shrink(self, target: Actions, room_bytes: int) -> PlanBytes | None:
        """Lets go of what a plan would not store; returns what the call needs then, or None if nothing is gained."""


@dataclass(eq=False)
class PendingCall:
    """Stands for a call whose backward pass has not run; holds no tensor.

    Attributes:
        planned: what is known of its plan.
        thread: the one that made the call.
        position: how many calls were pending when it was made.
        inputs: what the call was given, each storage with its bytes.
        looked_at: outputs and saved values, likewise, as far as anybody has asked for them.
        saved: refers to the saved values that nobody has asked for; a step of one call never asks.
        opened: the call itself, which may let go of what it stored; None where that is gone.
    """

    planned: PlannedCall
    thread: int
    position: int
    inputs: References
    looked_at: References
    saved: Sequence[Callable[[], Tensor | None]] = ()
    opened: Callable[[], Shrinks | None] = lambda: None

    @property
    def held(self) -> References:
        """Saved values, then outputs, each storage with its bytes; gone ones keep their place."""
        if self.saved:
            tensors = [tensor if (tensor := saved()) is not None else torch.empty(0) for saved in self.saved]
            self.looked_at, self.saved = (*references(tensors), *self.looked_at), ()
        return self.looked_at

    @held.setter
    def held(self, found: References) -> None:
        self.looked_at, self.saved = found, ()

    def shrink(self, target: Actions, room_bytes: int) -> bool:
        """Lets go of what a plan would not store, if the backward pass has room; says whether anything was gained."""
        opened = self.opened()
        chosen = None if opened is None else opened.shrink(target, room_bytes)
        if chosen is None:
            return False
        self.planned = replace(self.planned, chosen=chosen)
        return True

    def alive(self) -> dict[int, int]:
        """Returns the bytes of each storage that it still holds, or was given, by the storage's identity."""
        return {ref.cdata: n_bytes for ref, n_bytes in (*self.held, *self.inputs) if not ref.expired()}  # type: ignore[no-untyped-call]


_LOCK = threading.Lock()
_SERIAL = itertools.count()
_CALLS: WeakValueDictionary[int, PendingCall] = WeakValueDictionary()


def pending_calls(device: torch.device | None = None) -> list[PendingCall]:
    """Returns the calls of this thread whose backward pass has not run, in the order in which they were made."""
    if not _CALLS:
        return []
    with _LOCK:
        entered = sorted(_CALLS.items())
    thread = threading.get_ident()
    mine = [call for _, call in entered if call.thread == thread]
    return mine if device is None else [call for call in mine if _device(call.planned.model()) in (device, None)]


def _device(model: nn.Module | None) -> torch.device | None:
    return None if model is None else next((p.device for p in model.parameters()), None)


def references(tensors: Iterable[Tensor]) -> References:
    """Refers to the storages behind ``tensors``, with their bytes."""
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
    return tuple((StorageWeakRef(storage), storage.nbytes()) for storage in storages)  # type: ignore[no-untyped-call]


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Maps the identity to the bytes of every storage behind ``tensors``."""
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
    return {storage._cdata: storage.nbytes() for storage in storages}
