"""An operator that hands a gradient over as soon as it is made, so that it need not live to the end.

In a backward graph it stands right behind what makes a parameter's gradient. Whoever runs the graph says what takes it:
a sum in ``.grad``. What nobody takes is kept, and returned as any other gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Taker = Callable[[Tensor], None]
_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("take_gradient(Tensor gradient, int position) -> ()", tags=torch.Tag.pt2_compliant_tag)


class _Running(threading.local):
    """Holds what takes gradients in the backward pass that this thread runs; None where none runs."""

    takers: Mapping[int, Taker] | None = None
    kept: dict[int, Tensor]


_RUNNING = _Running()


@contextmanager
def taking(takers: Mapping[int, Taker]) -> Iterator[Mapping[int, Tensor]]:
    """Lets takers have the gradients of the graph that runs within, by position; yields those that nobody took."""
    before = _RUNNING.takers, getattr(_RUNNING, "kept", {})
    kept: dict[int, Tensor] = {}
    _RUNNING.takers, _RUNNING.kept = takers, kept
    try:
        yield kept
    finally:
        _RUNNING.takers, _RUNNING.kept = before


def _take_gradient(gradient: Tensor, position: int) -> None:
    if _RUNNING.takers is None:  # the profiler runs it, too
        return
    taker = _RUNNING.takers.get(position)
    if taker is None:
        _RUNNING.kept[position] = gradient
    else:
        taker(gradient)


_LIBRARY.impl("take_gradient", _take_gradient, "CPU")
_LIBRARY.impl("take_gradient", _take_gradient, "CUDA")
_LIBRARY.impl("take_gradient", lambda *_: None, "Meta")
