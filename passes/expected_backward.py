"""What a plan expects of the backward pass that follows the call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpectedBackward:
    """Describes a backward pass, as far as the plan depends on it.

    Attributes:
        absent: positions of the tangents that do not arrive.
        dropped: positions of the graph's outputs, bases of views included, that the caller no longer holds when it
            begins.
    """

    absent: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()


ALL_ARRIVE = ExpectedBackward()
