"""What a call of a planned signature finds, as far as its plan depends on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallState:
    """Describes one call; each state has a plan and graphs of its own. New fields need a default.

    Attributes:
        accumulating: whether gradients of an earlier backward pass exist, to which new ones are added.
        pending_bytes: what calls whose backward pass has not run yet hold in addition to this call's own tensors.
        held_limit_bytes: limit of what the plan may hold between its two halves, so that the backward passes of the
            pending calls fit; None if there is none.
        wanted_held_bytes: likewise, so that the calls that came next so far fit; given up where no plan keeps it.
        wanted_backward_bytes: limit of the peak of its backward half alone, likewise.
        added: positions of the graph's inputs whose gradients are added to the older ones as soon as they are made.
    """

    accumulating: bool = False
    pending_bytes: int = 0
    held_limit_bytes: int | None = None
    wanted_held_bytes: int | None = None
    wanted_backward_bytes: int | None = None
    added: frozenset[int] = frozenset()


FRESH = CallState()
