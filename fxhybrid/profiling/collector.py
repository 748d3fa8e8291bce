"""The garbage collector, kept from running at bad moments."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Leaves garbage alone until the block ends.

    Tracing and rewriting make graphs of many thousand objects that live on. The collector goes through all of them, and
    through torch's own, again and again: a third of the time, for nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def without_older_objects() -> Iterator[None]:
    """Keeps the collector from looking at what exists when the block begins, until it ends.

    What planning makes and drops is collected; what torch and the user's program hold, a hundred times as much, is not
    gone through meanwhile. A program that has frozen objects itself is left alone, as they would be thawed.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
