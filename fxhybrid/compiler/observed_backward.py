"""What the backward passes of a signature showed so far: which output gradients arrive, which outputs are held."""

from __future__ import annotations

from collections.abc import Iterable

from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.passes.traced import Traced

PATIENCE = 8  # backward passes after which what none of them showed is no longer planned for


class ObservedBackward:
    """Collects what backward passes of one signature showed; planning reads it before the next call.

    Both sets only grow: a tangent that arrived once is planned for from then on, so that no loop in which losses take
    turns is planned again and again.

    Attributes:
        count: how many backward passes began.
        arrived: positions of the tangents that arrived.
        held: positions of the outputs without a gradient that the caller still held when one began.
        alone: positions of the inputs whose gradients came from calls of this signature only, one in each pass.
        shared: positions of those that had gradients from elsewhere, too.
        revision: rises whenever what is planned may change.
    """

    def __init__(self) -> None:
        self.count = 0
        self.arrived: frozenset[int] = frozenset()
        self.held: frozenset[int] = frozenset()
        self.alone: frozenset[int] = frozenset()
        self.shared: frozenset[int] = frozenset()
        self.revision = 0

    def note(self, present: Iterable[int], held: Iterable[int]) -> None:
        """Notes a backward pass that begins."""
        self.count += 1
        arrived, all_held = self.arrived.union(present), self.held.union(held)
        if (arrived, all_held) != (self.arrived, self.held) or self.count in (1, PATIENCE):
            self.arrived, self.held = arrived, all_held
            self.revision += 1

    def is_known(self, position: int) -> bool:
        """Tells whether it is known of an input if gradients come from elsewhere, too."""
        return position in self.alone or position in self.shared

    def note_leaf(self, position: int, is_alone: bool) -> None:
        """Notes whether a call's own gradient of an input was all that the backward pass had for it."""
        self.revision += 1
        if not is_alone:
            self.shared |= {position}
            self.alone -= {position}
        elif position not in self.shared:
            self.alone |= {position}

    def outlooks(self, traced: Traced, now: ExpectedBackward, is_free: bool) -> list[ExpectedBackward]:
        """Returns the backward passes to plan for, each where the budget has no room for those before it.

        The last one relies on the caller to drop the outputs without a gradient that none was seen to hold; where they
        are held when the backward pass begins, that is an error then.

        Args:
            traced: the signature.
            now: what is planned for at present.
            is_free: whether the present plan adds no time: then there is nothing to win by fewer gradients.
        """
        if not self.count:  # only beside a loss are other outputs taken for dropped before that was seen
            dropping = ExpectedBackward(now.absent, traced.droppable(now.absent))
            return list(dict.fromkeys([now, dropping] if now.absent else [now]))
        shown = traced.without(self.arrived)
        cautious = now.absent & shown
        certain = self.count >= PATIENCE
        absent = shown if certain and not is_free else cautious
        dropped = traced.droppable(absent) - self.held
        if not (certain or is_free):  # a plan without added time has room for outputs that are held after all
            dropped &= now.dropped
        least = ExpectedBackward(shown, traced.droppable(shown) - self.held)
        return list(dict.fromkeys([ExpectedBackward(absent, dropped), least]))


def first_expected(traced: Traced) -> ExpectedBackward:
    """Returns what the first backward pass of a signature is expected to be like."""
    tangent = traced.tangents.get(traced.structure.loss) if traced.structure.loss is not None else None
    return ExpectedBackward() if tangent is None else ExpectedBackward(traced.without([tangent]))
