"""Moves between plans, and what each does to the heights, the added time and the error.

A move changes one tensor's action and whatever must follow (``Choices.complete``). Its effect is measured by
making it and taking it back: exact chain costs at the present state, a good guess at a later one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fxhybrid.solvers.choices import Changes, Choices
from fxhybrid.solvers.grid import NEVER, RECOMPUTED, SAVED

MAX_SEGMENTS = 10
SMALL_SHARE = 1e-6  # of all bytes: tensors below that are left as they are
Floats = npt.NDArray[np.float64]


class MoveTable:
    """Every move from the present state, as arrays: one row per tensor, target code and variant.

    Attributes:
        row: tensor, code and variant of each row.
        rows_of: rows of each tensor.
        begin, end, delta: slots and bytes that come or go there, several segments per row.
        seconds: added seconds of each row.
        error2: squared error that each row adds.
        valid: whether the row is a move at all.
        changes: new codes that make the move.
        stale: tensors whose rows were measured at another state that may differ for them.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.base = choices.base
        floor = sum(self.base.sizes) * SMALL_SHARE
        self.rows_of: dict[int, range] = {}
        self.row: list[tuple[int, int, bool]] = []
        for t, codes in choices.codes.items():
            if len(codes) < 2 or self.base.sizes[t] <= floor or t in self.base.held:
                continue
            first = len(self.row)
            for code in codes:
                self.row.append((t, code, False))
                if code != SAVED and (code == RECOMPUTED or self.base.lossy(t, code)):
                    self.row.append((t, code, True))
            self.rows_of[t] = range(first, len(self.row))
        n = len(self.row)
        self.begin = np.zeros((n, MAX_SEGMENTS), np.int64)
        self.end = np.zeros((n, MAX_SEGMENTS), np.int64)
        self.delta = np.zeros((n, MAX_SEGMENTS))
        self.seconds = np.zeros(n)
        self.error2 = np.zeros(n)
        self.valid = np.zeros(n, bool)
        self.changes: list[Changes] = [{}] * n
        self.stale = set(self.rows_of)

    def refresh(self, tensors: Iterable[int] | None = None) -> None:
        """Measures the moves of those of ``tensors`` (all if None) that are stale."""
        base = self.base
        for t in [t for t in (self.rows_of if tensors is None else tensors) if t in self.stale]:
            self.stale.discard(t)
            seen: list[Changes] = []
            for r in self.rows_of[t]:
                _, code, deep = self.row[r]
                self.valid[r] = False
                if base.use[t] == NEVER or base.state[t] == code:
                    continue
                changes = self.choices.complete(t, code, deep)
                if changes is not None and changes not in seen:
                    seen.append(changes)
                    self._measure(r, changes)

    def age(self, changed: Iterable[int]) -> set[int]:
        """Marks as stale what a change of ``changed`` may alter."""
        near = self.base.near(changed, 1).intersection(self.rows_of)
        self.stale |= near
        return near

    def _measure(self, r: int, changes: Changes) -> None:
        effect = self.base.effect(changes)
        if effect is None:
            return
        intervals, self.seconds[r], self.error2[r] = effect
        segments = _segments(intervals)
        self.begin[r] = self.end[r] = 0
        self.delta[r] = 0.0
        for k, (a, b, d) in enumerate(segments):
            self.begin[r, k], self.end[r, k], self.delta[r, k] = a, b, d
        self.changes[r] = changes
        self.valid[r] = True


def _segments(intervals: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The sum of ``intervals`` as few segments; where they are too many, neighbours join at the higher one."""
    jumps: dict[int, int] = {}
    for begin, end, size in intervals:
        if begin < end:
            jumps[begin] = jumps.get(begin, 0) + size
            jumps[end] = jumps.get(end, 0) - size
    places = sorted(at for at, jump in jumps.items() if jump)
    segments: list[tuple[int, int, int]] = []
    level = 0
    for i, at in enumerate(places[:-1]):
        level += jumps[at]
        if level:
            segments.append((at, places[i + 1], level))
    while len(segments) > MAX_SEGMENTS:
        k = min(range(len(segments) - 1), key=lambda k: segments[k + 1][1] - segments[k][0])
        (begin, _, a), (_, end, b) = segments[k : k + 2]
        segments[k : k + 2] = [(begin, end, max(a, b))]
    return segments
