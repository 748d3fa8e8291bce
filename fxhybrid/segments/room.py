"""What a call of a step of several graphs may take, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import nn

from fxhybrid.capture.step import StepCall
from fxhybrid.compiler.bytes_beside import Participant, beside_bytes, model_storages
from fxhybrid.compiler.model_parameters import has_gradients
from fxhybrid.compiler.pending_calls import References, pending_calls, storages_of
from fxhybrid.profiling.state_bytes import gradient_bytes


@dataclass(frozen=True, eq=False)
class Room:
    """Says what a call may take.

    Attributes:
        limit_bytes: of the peak, less what stands beside the call.
        resident_bytes: alive through the whole step.
        resident: returns the identities of the storages that are.
        gradient_bytes: of all parameters that get one on the planned path.
        least_bytes: returns what each part of the planned path takes at least, above what is alive before it.
    """

    limit_bytes: int
    resident_bytes: int
    resident: Callable[[], Collection[int]]
    gradient_bytes: int
    least_bytes: Callable[[], Sequence[int]]


@dataclass(eq=False)
class NothingPending:
    """Stands for a trial run, which nobody waits for."""

    held: References = ()

    def alive(self) -> dict[int, int]:
        """Returns nothing: a trial run has all the room it needs."""
        return {}


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Counts what stands beside the calls of a model.

    Attributes:
        model: the user's.
    """

    model: nn.Module

    def beside_bytes(self, call: StepCall) -> int:
        """Counts what stands beside a call: older gradients, and what other calls hold."""
        extra = self.older_bytes()
        others = pending_calls(next((p.device for p in self.model.parameters()), None))
        if others:
            extra += beside_bytes(Participant(self.model, self.own_storages(call)), others)
        return extra

    def own_storages(self, call: StepCall) -> dict[int, int]:
        """Maps the identity to the bytes of every storage that a call's plan counts through the whole step."""
        return model_storages(self.model) | storages_of(call.tensors)

    def older_bytes(self) -> int:
        """Counts the gradients of an earlier backward pass."""
        return gradient_bytes(self.model) if has_gradients(self.model) else 0
