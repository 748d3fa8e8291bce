"""Recognizes a call that finds everything as the one before it did, for which the same graphs run again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fxhybrid.compiler.active_graphs import ActiveGraph
from fxhybrid.compiler.admission import Following, following_alone
from fxhybrid.compiler.model_parameters import has_gradients
from fxhybrid.compiler.pending_calls import pending_calls
from fxhybrid.compiler.signature import Signature


@dataclass(frozen=True, eq=False)
class RepeatedCall:
    """Holds what ran a call beside which no other one was pending, with fresh gradients, and what that depended on.

    Attributes:
        signature: of the call; one that is planned anew is another value.
        revision: of what backward passes of the signature showed.
        following: what followed such calls.
        active: what ran it.
    """

    signature: Signature
    revision: int
    following: Following | None
    active: ActiveGraph

    @classmethod
    def of(cls, signature: Signature, active: ActiveGraph) -> RepeatedCall:
        """Remembers a call."""
        following = following_alone(signature.state.prepared.capture)
        return cls(signature, signature.observed.revision, following, active)

    def chosen_by(self, signature: Signature) -> bool:
        """Tells whether the same would be chosen for another call that is the first of its step."""
        return (
            signature is self.signature
            and signature.observed.revision == self.revision
            and following_alone(signature.state.prepared.capture) is self.following
        )


def is_first_of_step(model: nn.Module) -> bool:
    """Tells whether a call finds neither older gradients nor calls whose backward pass is still to come."""
    return not pending_calls() and not has_gradients(model)
