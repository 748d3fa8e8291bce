"""Moves between plans, and what each does to the heights, the added time and the error.

A move changes one tensor's action and whatever must follow (``Choices.complete``). Its effect is measured by
making it and taking it back: exact chain costs at the present state, a good guess at a later one. What was measured
is kept for when the tensor's surroundings, two ops wide, are the same again, which in a search they often are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from fxhybrid.solvers.choices import MAX_CHAIN, Changes, Choices
from fxhybrid.solvers.grid import NEVER, RECOMPUTED, Ints
from fxhybrid.solvers.lives import Interval

DEPTHS = (2, 3, MAX_CHAIN)  # of chains made again, beside single ops
AROUND = 2  # ops between a tensor and those whose codes its moves depend on, as a rule
MAX_SEGMENTS = 10
NARROW = 3  # segments of most rows
SMALL_SHARE = 1e-6  # of all bytes: tensors below that are left as they are
Floats = npt.NDArray[np.float64]
ALL = slice(None)


class MoveTable:
    """Every move from the present state, as arrays: one row per tensor, target code and depth.

    Attributes:
        row: tensor, code and depth of each row.
        rows_of: rows of each tensor.
        begin, end, delta: slots and bytes that come or go there, several segments per row.
        segments: the same as lists.
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
        self.row: list[tuple[int, int, int]] = []
        for t, codes in choices.codes.items():
            if len(codes) < 2 or self.base.sizes[t] <= floor or t in self.base.held:
                continue
            first = len(self.row)
            for code in codes:
                again = code == RECOMPUTED
                depths = (0, *DEPTHS) if again else (0, MAX_CHAIN) if self.base.lossy(t, code) else (0,)
                self.row += [(t, code, depth) for depth in depths]
            self.rows_of[t] = range(first, len(self.row))
        n = len(self.row)
        self.begin = np.zeros((n, MAX_SEGMENTS), np.int64, order="F")  # as columns are gone through one by one
        self.end = np.zeros((n, MAX_SEGMENTS), np.int64, order="F")
        self.delta = np.zeros((n, MAX_SEGMENTS), order="F")
        self.seconds = np.zeros(n)
        self.error2 = np.zeros(n)
        self.valid = np.zeros(n, bool)
        self.changes: list[Changes] = [{}] * n
        self.segments: list[list[Interval]] = [[]] * n
        self._wide = np.zeros(n, bool)
        self._columns: tuple[np.ndarray, ...] = (
            self.begin,
            self.end,
            self.delta,
            self.seconds,
            self.error2,
            self.valid,
            self._wide,
        )
        self.stale = set(self.rows_of)
        # one more than the neighbours, as itemgetter gives no tuple for one alone
        self._near = {t: itemgetter(*sorted(self.base.near((t,), AROUND)), t) for t in self.rows_of}
        self._context: dict[int, Any] = {}
        self._known: dict[tuple[int, Any], Any] = {}

    def refresh(self, tensors: Iterable[int] | None = None) -> None:
        """Measures the moves of those of ``tensors`` (all if None) that are stale."""
        for t in [t for t in (self.rows_of if tensors is None else tensors) if t in self.stale]:
            self.stale.discard(t)
            near = self._near[t]
            context = near(self.base.state), near(self.base.use)
            if context == self._context.get(t):
                continue
            self._context[t] = context
            rows = slice(self.rows_of[t].start, self.rows_of[t].stop)
            if (t, context) not in self._known:
                self._measure(t)
                measured = [column[rows].copy() for column in self._columns]
                self._known[t, context] = measured, self.changes[rows], self.segments[rows]
                continue
            measured, self.changes[rows], self.segments[rows] = self._known[t, context]
            for column, numbers in zip(self._columns, measured, strict=True):
                column[rows] = numbers

    def age(self, changed: AbstractSet[int], *, at_once: bool = True) -> None:
        """Marks as stale what a change of ``changed`` may alter.

        The moves of ``changed`` themselves are others now, and would not be seen if they were only marked: they are
        measured ``at_once``.
        """
        self.stale |= self.base.near(changed, AROUND).intersection(self.rows_of)
        if at_once:
            self.refresh(sorted(self.rows_of.keys() & changed))

    def weighed(self, change: Callable[[Floats], Floats], total: Floats, rows: slice | Ints = ALL) -> Floats:
        """Per row: the sum over its slots of ``change(delta)`` times the slot's weight; ``total`` is cumulative."""

        def part(rows: slice | Ints, columns: range) -> Floats:
            return reduce(
                np.add,
                (
                    change(self.delta[rows, k]) * (total[self.end[rows, k]] - total[self.begin[rows, k]])
                    for k in columns
                ),
            )

        sums = part(rows, range(NARROW))
        wide = np.flatnonzero(self._wide[rows])
        if len(wide):
            sums[wide] += part(np.arange(len(self.row))[rows][wide], range(NARROW, MAX_SEGMENTS))
        return sums

    def _measure(self, t: int) -> None:
        base = self.base
        seen: list[Changes] = []
        for r in self.rows_of[t]:
            _, code, depth = self.row[r]
            self.valid[r] = False
            if base.use[t] == NEVER or base.state[t] == code:
                continue
            changes = self.choices.complete(t, code, depth)
            if changes is not None and changes not in seen:
                seen.append(changes)
                self._measure_row(r, changes)

    def _measure_row(self, r: int, changes: Changes) -> None:
        effect = self.base.effect(changes)
        if effect is None:
            return
        steps, self.seconds[r], self.error2[r] = effect
        segments = _segments(steps)
        self.delta[r] = 0.0
        for k, (begin, end, size) in enumerate(segments):
            self.begin[r, k], self.end[r, k], self.delta[r, k] = begin, end, size
        self._wide[r] = len(segments) > NARROW
        self.segments[r] = segments
        self.changes[r] = changes
        self.valid[r] = True


@dataclass
class Pace:
    """How many moves are made at once, and when to give up.

    Attributes:
        banned: rows that were refused alone.
        batch: moves made at once.
        most: of them.
        fails: moves refused in a row.
    """

    banned: npt.NDArray[np.bool_]
    batch: int
    most: int
    fails: int = 0

    def quicken(self) -> None:
        """After moves that were made."""
        self.fails, self.batch = 0, min(2 * self.batch, self.most)

    def slow_down(self, rows: list[int]) -> None:
        """After moves that were taken back."""
        self.fails += 1
        if len(rows) == 1:
            self.banned[rows] = True
        self.batch = max(1, len(rows) // 4)


def _segments(steps: dict[int, int]) -> list[Interval]:
    """Where ``steps`` lead to another height than 0; where they are too many, neighbours join at the higher one."""
    segments: list[Interval] = []
    level = begin = 0
    for at, step in sorted(steps.items()):
        if step:
            if level:
                segments.append((begin, at, level))
            level += step
            begin = at
    while len(segments) > MAX_SEGMENTS:
        k = min(range(len(segments) - 1), key=lambda k: segments[k + 1][1] - segments[k][0])
        (begin, _, a), (_, end, b) = segments[k : k + 2]
        segments[k : k + 2] = [(begin, end, max(a, b))]
    return segments
