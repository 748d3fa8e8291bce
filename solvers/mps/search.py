"""Local search over plans, at a price for the peak or down to a target.

``relax`` makes ``overhead_s + price * peak`` small, with the peak smoothed over the slots near it, so that several
peaks that must fall together are seen together. ``descend`` and ``trim`` then meet a target exactly. Every limit is
a number of moves made, so that the same input gives the same plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fxhybrid.solvers.mps.move_table import Bools, Floats, MoveTable, Pace, lowest, sums
from fxhybrid.solvers.mps.neighbourhood import Changes
from fxhybrid.solvers.mps.plan_state import Footprint, Footprints
from fxhybrid.solvers.mps.problem_tables import Ints

SHARPNESS = 200.0  # slots one part in so many below the peak weigh 1 / e of it
NEARLY = 0.99  # of the target: slots above that count as overloaded, so that moves reach below it
SCARCITY = 16  # power of height over target that says how scarce a slot's room is
ROWS_PER_PICK = 2000  # moves picked between two scorings: one, and one more for so many rows
LOOKED_AT = 200  # moves looked at for one batch
FAILS = 24  # moves refused in a row before a search gives up
NOTHING = 1e-9  # of the step: seconds below that are no gain


class Descent:
    """The search; it stands at the state of ``base``.

    Attributes:
        base: the present state, measured.
        table: moves from it.
        max_error2: limit of the sum of squared errors.
        error_price_s: seconds that one unit of squared error is worth.
        stop_at: moves made by then end the search.
    """

    def __init__(self, base: Footprints, table: MoveTable, max_error2: float) -> None:
        self.base = base
        self.table = table
        self.max_error2 = max_error2
        self.error_price_s = 0.0
        self.stop_at = 0
        self.most_at_once = max(32, len(table.row) // 100)
        self.nothing_s = NOTHING * base.problem.step_s

    @property
    def tired(self) -> bool:
        """Whether the work is used up."""
        return self.base.moves >= self.stop_at

    @property
    def cost_s(self) -> float:
        """Added seconds and the error's price."""
        return self.base.overhead_s + self.error_price_s * self.base.error2

    def _costs(self, rows: Ints) -> Floats:
        """``cost_s`` that each move of ``rows`` adds."""
        cost: Floats = self.table.seconds[rows] + self.error_price_s * self.table.error2[rows]
        return cost

    def plan(self) -> EvaluatedPlan:
        """The present state."""
        return EvaluatedPlan(bytes(self.base.state), self.base.footprint())

    def stand_at(self, codes: bytes, *, to_search: bool = True) -> bool:
        """Moves to a state, ``to_search`` from there; whether it is a valid one within the error limit."""
        moved = self.base.move(self.base.changes_to(codes))
        self.table.age(moved.keys(), at_once=to_search)
        return self.allowed()

    def allowed(self) -> bool:
        """Whether the present state is valid and within the error limit."""
        return self.base.valid and self.base.error2 <= self.max_error2 * (1 + 1e-9)

    def _improve(
        self,
        pace: Pace,
        pick: Callable[[], tuple[list[int], Changes]],
        figure: Callable[[], float],
        *,
        until: Callable[[], bool] = lambda: False,
        patient: bool = True,
        accept: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the moves picked, and takes those back that do not lower the figure.

        Args:
            pace: how many are made at once.
            pick: rows and changes to make together; none where there is nothing to gain.
            figure: what falls.
            until: ends the search.
            patient: measures stale moves anew before it gives up.
            accept: is told of moves made.
        """
        value = figure()
        while not self.tired and not until():
            rows, changes = pick() if pace.fails < FAILS else ([], {})
            if not rows:
                if not (patient and self.table.stale):
                    return
                self.table.refresh()
                pace.fails = 0
                continue
            moved = self.base.move(changes)
            lower = figure()
            if self.allowed() and lower < value:
                value = lower
                self.table.age(moved.keys())
                pace.quicken()
                accept()
            else:
                self.base.undo()
                pace.slow_down(rows)

    def _pace(self, batch: int, most: int | None = None) -> Pace:
        return Pace(np.zeros(len(self.table.row), bool), batch, self.most_at_once if most is None else most)

    # -- at a price ----------------------------------------------------------------------------------------

    def relax(self, price: float) -> None:
        """Makes moves until none makes ``cost_s + price * smooth peak`` smaller; ``price`` is seconds per byte."""
        sharp = SHARPNESS / max(self.base.footprint().peak_bytes, 1)
        pace = self._pace(8)
        self._improve(pace, lambda: self._improving(price, sharp, pace), lambda: self._value(price, sharp))

    def _value(self, price: float, sharp: float) -> float:
        heights = self.base.heights()
        top = int(heights.max())
        smooth = top + math.log(float(np.exp(sharp * (heights - top)).sum())) / sharp
        return self.cost_s + price * smooth

    def _improving(self, price: float, sharp: float, pace: Pace) -> tuple[list[int], Changes]:
        """A batch of moves, the most useful first, that do not touch each other's tensors."""
        table, batch = self.table, pace.batch
        heights = self.base.heights()
        weights = sums(np.exp(sharp * (heights - heights.max())))

        def gains(rows: Ints) -> Floats:
            grown = table.weighed(lambda delta: np.expm1(np.clip(sharp * delta, -700.0, 200.0)), weights, rows)
            smooth = np.log(np.maximum(1.0 + grown / weights[-1], 1e-300)) / sharp
            gain: Floats = -(self._costs(rows) + price * smooth)
            return gain

        wanted = table.possible(pace.banned, self.base.error2, self.max_error2)
        gain = gains(wanted)
        useful = np.flatnonzero(gain > self.nothing_s)
        picks: list[int] = []
        for r in wanted[useful[lowest(-gain[useful], 4 * batch)]].tolist():
            if len(picks) == 2 * batch:
                break
            t = table.row[r][0]
            if t in table.stale:
                table.refresh((t,))
                rows = slice(table.rows_of[t].start, table.rows_of[t].stop)
                again = table.possible(pace.banned, self.base.error2, self.max_error2, rows)
                fresh = gains(again)
                if not len(fresh) or fresh.max() <= self.nothing_s:
                    continue
                r = int(again[fresh.argmax()])
            picks.append(r)
        return self._together(picks, batch)

    def _together(self, picks: list[int], batch: int) -> tuple[list[int], Changes]:
        """As many of ``picks`` as stay clear of each other and within the error limit."""
        table, error2 = self.table, self.base.error2
        rows: list[int] = []
        together: Changes = {}
        for r in picks:
            changes = table.changes[r]
            fits = error2 + table.error2[r] <= self.max_error2
            if fits and len(rows) < batch and together.keys().isdisjoint(self.base.near(changes, 1)):
                together.update(changes)
                error2 += float(table.error2[r])
                rows.append(r)
        return rows, together

    # -- to a target ---------------------------------------------------------------------------------------

    def descend(self, target: int) -> bool:
        """Goes down to a peak of at most ``target``; False if it got stuck on the way."""

        def reached() -> bool:
            return bool(self.base.heights().max() <= target)

        pace = self._pace(4)
        self._improve(
            pace, lambda: self._lowering(target, pace), lambda: _excess(self.base.heights(), target), until=reached
        )
        return reached()

    def _lowering(self, target: int, pace: Pace) -> tuple[list[int], Changes]:
        """A batch of moves of the highest score that do not touch each other's tensors."""
        table = self.table
        height = self.base.heights().astype(np.float64)
        error2 = self.base.error2
        rows: list[int] = []
        picked: Changes = {}
        busy = pace.banned.copy()
        at_once = 1 + len(table.row) // ROWS_PER_PICK
        while table.row and len(rows) < pace.batch and height.max() > target:
            score = self._scores(height, target, error2, busy)
            useful = np.flatnonzero(score > 0.0)
            if len(useful) < at_once:
                useful = np.arange(len(score))
            order = useful[lowest(-score[useful], at_once)].tolist()
            if score[order[0]] <= 0.0:
                break
            for r in order:
                t = table.row[r][0]
                if t in table.stale:
                    table.refresh((t,))
                elif score[r] > 0.0 and not busy[r] and len(rows) < pace.batch:
                    changes = table.changes[r]
                    busy[r] = True
                    if picked.keys().isdisjoint(self.base.near(changes)):
                        picked.update(changes)
                        busy[table.rows_of[t].start : table.rows_of[t].stop] = True
                        error2 += float(table.error2[r])
                        rows.append(r)
                        table.add(height, r)
        return rows, picked

    def _scores(self, height: Floats, target: int, error2: float, busy: Bools) -> Floats:
        """Bytes freed at the overloaded slots per second of added delay, 0 where a move cannot be or is ``busy``."""
        table = self.table
        over = np.maximum(height - NEARLY * target, 0.0)
        top = float(over.max())
        rows = table.possible(busy, error2, self.max_error2 * (1 + 1e-12))
        gain = table.weighed(lambda delta: np.minimum(-delta, top), sums(over / top), rows)
        rate = gain / np.maximum(self._costs(rows), 1e-6 * self.base.problem.step_s + 1e-30)
        score = np.zeros(len(table.row))
        score[rows] = np.maximum(rate, 0.0)
        return score

    def trim(self, target: int, seen: list[EvaluatedPlan] | None = None) -> None:
        """Makes moves that save time while the peak stays at or below ``target``; ``seen`` gets the points passed."""

        def cost() -> float:
            return self.cost_s if self.base.heights().max() <= target else math.inf

        pace = self._pace(8) if seen is None else self._pace(1, 1)
        self._improve(
            pace,
            lambda: self._fitting(target, self._savers(target, pace.banned), pace.batch),
            cost,
            patient=False,
            accept=lambda: None if seen is None else seen.append(self.plan()),
        )

    def _savers(self, target: int, banned: Bools) -> Ints:
        """Some moves that save time, those first that save most per byte where the room is scarce."""
        table = self.table
        wanted = np.flatnonzero(table.valid & ~banned)
        cost = self._costs(wanted)
        saving = cost < -self.nothing_s
        wanted, cost = wanted[saving], cost[saving]
        total = sums((self.base.heights() / max(target, 1)) ** SCARCITY)
        taken = np.maximum(table.weighed(lambda delta: delta, total, wanted), 1.0)
        return wanted[lowest(cost / taken, LOOKED_AT)]

    def _fitting(self, target: int, order: Ints, batch: int) -> tuple[list[int], Changes]:
        """Moves that should keep the target, apart from each other."""
        table = self.table
        height = self.base.heights().astype(np.float64)
        error2 = self.base.error2
        rows: list[int] = []
        picked: Changes = {}
        top = int(height.argmax())
        for r in order.tolist():
            if not table.fits(height, top, r, target) or error2 + table.error2[r] > self.max_error2:
                continue
            t = table.row[r][0]
            stale = t in table.stale
            table.refresh((t,))
            cost = table.seconds[r] + self.error_price_s * table.error2[r]
            if not table.valid[r] or cost >= 0.0 or (stale and not table.fits(height, top, r, target)):
                continue
            changes = table.changes[r]
            if picked.keys().isdisjoint(self.base.near(changes)):
                picked.update(changes)
                error2 += float(table.error2[r])
                table.add(height, r)
                top = int(height.argmax())
                rows.append(r)
                if len(rows) >= batch:
                    break
        return rows, picked


def _excess(heights: Ints, target: int) -> float:
    """How far above the target, all slots counted."""
    over = np.maximum(heights - NEARLY * target, 0.0)
    return float((over * over).sum())


@dataclass(frozen=True)
class EvaluatedPlan:
    """A measured state; its codes as bytes."""

    codes: bytes
    cost: Footprint


def by_peak(plan: EvaluatedPlan) -> tuple[int, float]:
    """Sorts points by their peaks."""
    return plan.cost.peak_bytes, plan.cost.overhead_s


def undominated(evaluated: list[EvaluatedPlan]) -> list[EvaluatedPlan]:
    """The points that no other one beats, the cheapest first; the first of ``evaluated`` is the start."""
    best: list[EvaluatedPlan] = []
    for plan in sorted(evaluated[1:], key=lambda p: (p.cost.overhead_s, p.cost.peak_bytes, p.cost.error2)):
        if plan.cost.peak_bytes < min(evaluated[0].cost.peak_bytes, best[-1].cost.peak_bytes if best else 1 << 62):
            best.append(plan)
    return best
