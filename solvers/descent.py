"""Local search over plans: go down to a target peak, then take back what is not needed.

Every limit is a number of measurements, so that the same input gives the same plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fxhybrid.solvers.footprint import Footprint, Footprints
from fxhybrid.solvers.grid import State
from fxhybrid.solvers.moves import Floats, MoveTable

SHAKEN = 4


@dataclass(frozen=True)
class Point:
    """A measured state."""

    state: State
    mark: Footprint


@dataclass
class Descent:
    """The search and the points that it has seen.

    Attributes:
        base: measures states.
        table: moves from the present state.
        max_error2: limit of the sum of squared errors.
        error_price_s: seconds that one unit of squared error is worth.
        work: measurements left.
        points: every point kept so far.
    """

    base: Footprints
    table: MoveTable
    max_error2: float
    error_price_s: float = 0.0
    work: int = 1000
    points: list[Point] = field(default_factory=list)

    def start(self, state: State) -> Point | None:
        """Measures ``state`` and makes it the state that the table's moves start from."""
        point = self.measure(state)
        if point is not None:
            self.table.refresh(point.state, point.mark)
        return point

    def measure(self, state: State) -> Point | None:
        """The measured state; None if invalid or above the error limit."""
        self.work -= 1
        mark = self.base.measure(state)
        if mark is None or mark.error2 > self.max_error2 * (1 + 1e-9):
            return None
        return Point(state, mark)

    def descend(self, point: Point, target: int) -> Point | None:
        """A point with a peak of at most ``target``, or None; the table then stands at ``self.last``."""
        blocked = np.zeros(len(self.table.row), bool)
        batch = 4
        self.last = point
        while point.mark.peak_bytes > target:
            if self.work <= 0:
                return None
            rows, state, changed = self._pick(point, target, blocked, batch)
            if not rows:
                return None
            new = self.measure(state)
            if new is not None and _excess(new.mark, target) < _excess(point.mark, target):
                point = self.last = new
                self.table.refresh(point.state, point.mark, self.table.near(changed))
                batch = min(2 * batch, 16)
            elif len(rows) > 1:
                batch = 1
            else:
                blocked[rows] = True
        return point

    def _pick(self, point: Point, target: int, blocked: np.ndarray, batch: int) -> tuple[list[int], State, set[int]]:
        """Up to ``batch`` moves of the highest score that do not touch each other's tensors."""
        table = self.table
        height = point.mark.height.astype(np.float64)
        error2 = point.mark.error2
        rows: list[int] = []
        state = point.state.copy()
        changed: set[int] = set()
        busy = blocked.copy()
        checked: set[int] = set()
        while table.row and len(rows) < batch and height.max() > target:
            score = self._scores(height, target, error2)
            score[busy] = 0.0
            r = int(score.argmax())
            if score[r] <= 0.0:
                break
            t = table.row[r][0]
            if t not in checked:
                checked.add(t)
                table.refresh(point.state, point.mark, (t,))
                continue
            changes = table.changes[r] or {}
            near = table.near(changes)
            if not changed.isdisjoint(near):
                busy[r] = True
                continue
            for u, code in changes.items():
                state[u] = code
            changed.update(changes)
            busy[table.rows_of[t]] = True
            error2 += float(table.error2[r])
            rows.append(r)
            self._add(height, r)
        return rows, state, changed

    def _add(self, height: Floats, r: int) -> None:
        table = self.table
        for a, b, d in zip(table.begin[r], table.end[r], table.delta[r], strict=True):
            if d:
                height[a:b] += d

    def _scores(self, height: Floats, target: int, error2: float) -> Floats:
        """Bytes freed at the overloaded slots per second of added delay, 0 where a move cannot be."""
        table = self.table
        over = np.maximum(height - 0.99 * target, 0.0)
        top = float(over.max())
        total = np.concatenate([[0.0], np.cumsum(over / top)])
        freed = np.minimum(-table.delta, top)
        gain = (freed * (total[table.end] - total[table.begin])).sum(1)
        cost = table.seconds + self.error_price_s * table.error2
        score: Floats = gain / np.maximum(cost, 1e-6 * self.base.problem.step_s + 1e-30)
        score[~table.valid | (gain <= 0) | (error2 + table.error2 > self.max_error2 * (1 + 1e-12))] = 0.0
        return score

    def trim(self, point: Point, target: int, fails: int = 8) -> Point:
        """Takes moves that save time while the peak stays at or below ``target``."""
        table = self.table
        banned = np.zeros(len(table.row), bool)
        batch = 8
        while fails > 0 and self.work > 0:
            cost = table.seconds + self.error_price_s * table.error2
            wanted = np.flatnonzero(table.valid & ~banned & (cost < -1e-9 * self.base.problem.step_s))
            rows, state, changed = self._fitting(point, target, wanted[np.argsort(cost[wanted])], batch, banned)
            if not rows:
                break
            new = self.measure(state)
            if new is not None and new.mark.peak_bytes <= target and self._cost(new) < self._cost(point):
                point = new
                table.refresh(point.state, point.mark, table.near(changed))
                batch = min(2 * batch, 32)
            elif len(rows) > 1:
                batch = max(1, batch // 4)
                fails -= 1
            else:
                banned[rows] = True
                fails -= 1
        return point

    def shake(self, point: Point, target: int, turn: int) -> Point:
        """Takes back some dear actions, goes down to ``target`` again and keeps the cheaper point."""
        table = self.table
        cost = table.seconds + self.error_price_s * table.error2
        dear = np.flatnonzero(table.valid & (cost < 0))
        dear = dear[np.argsort(cost[dear], kind="stable")]
        state = point.state.copy()
        changed: set[int] = set()
        taken = 0
        for r in dear[turn % 3 :: 3]:
            changes = table.changes[r] or {}
            if changed.isdisjoint(table.near(changes)):
                for u, code in changes.items():
                    state[u] = code
                changed.update(changes)
                taken += 1
                if taken == SHAKEN:
                    break
        other = self.measure(state) if taken else None
        if other is None:
            return point
        self.table.refresh(other.state, other.mark, table.near(changed))
        lower = self.descend(other, target)
        if lower is not None:
            other = self.trim(lower, target, fails=4)
            if self._cost(other) < self._cost(point):
                return other
        self.move(self.last if lower is None else other, point)
        return point

    def move(self, old: Point, new: Point) -> None:
        """Makes the table stand at ``new`` instead of ``old``."""
        differ = [t for t in self.table.rows_of if old.state[t] != new.state[t]]
        self.table.refresh(new.state, new.mark, self.table.near(differ))

    def _cost(self, point: Point) -> float:
        return point.mark.added_s + self.error_price_s * point.mark.error2

    def _fitting(
        self, point: Point, target: int, order: Iterable[int], batch: int, banned: np.ndarray
    ) -> tuple[list[int], State, set[int]]:
        table = self.table
        height = point.mark.height.astype(np.float64)
        error2 = point.mark.error2
        rows: list[int] = []
        state = point.state.copy()
        changed: set[int] = set()
        for r in order:
            changes = table.changes[r] or {}
            if not changed.isdisjoint(changes) or error2 + table.error2[r] > self.max_error2:
                continue
            if self._fits(height, int(r), target):
                table.refresh(point.state, point.mark, (table.row[r][0],))
                changes = table.changes[r] or {}
                if not table.valid[r] or (table.seconds[r] >= 0 and table.error2[r] >= 0):
                    continue
                if not self._fits(height, int(r), target) or not changed.isdisjoint(table.near(changes)):
                    continue
                for u, code in changes.items():
                    state[u] = code
                changed.update(changes)
                error2 += float(table.error2[r])
                self._add(height, int(r))
                rows.append(int(r))
                if len(rows) >= batch:
                    break
        return rows, state, changed

    def _fits(self, height: Floats, r: int, target: int) -> bool:
        table = self.table
        for a, b, d in zip(table.begin[r], table.end[r], table.delta[r], strict=True):
            if d > 0 and height[a:b].max() + d > target:
                return False
        return True


def _excess(mark: Footprint, target: int) -> float:
    """How far above the target, all slots counted."""
    over = np.maximum(mark.height - 0.99 * target, 0.0)
    return float((over * over).sum())
