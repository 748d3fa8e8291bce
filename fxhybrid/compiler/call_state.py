"""What a call of a planned signature finds, as far as its plan depends on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class CallState:
    """Describes one call; each state has a plan and graphs of its own. New fields need a default.

    Attributes:
        accumulating: whether gradients of an earlier backward pass exist, to which new ones are added.
    """

    accumulating: bool = False


FRESH = CallState()


def call_state(parameters: Iterable[nn.Parameter]) -> CallState:
    """Reads the state of a call that is about to be made."""
    return CallState(accumulating=any(p.grad is not None for p in parameters))
