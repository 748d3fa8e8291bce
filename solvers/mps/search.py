"""Local search over plans, at a Lagrange multiplier of the peak or down to a target.

Problem
    minimise   overhead(plan) + mu * peak(plan)              (``relax``)
    find       a plan with peak(plan) <= target              (``descend``)
    minimise   overhead(plan) with peak(plan) <= target      (``trim``)
    over plans within the error limit, each by moves from the present plan.

Method
    Batches of moves that do not touch each other's tensors are applied together, the best first by the move table's
    figures, and undone if the plan's own figure did not fall. ``relax`` smooths the peak over the slots near it, so
    that several peaks that must fall together are seen together. Every limit is a number of moves made, so that the
    same input gives the same plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fxhybrid.solvers.mps.move_table import Batch, Bools, Floats, MoveTable, lowest, sums
from fxhybrid.solvers.mps.neighbourhood import Changes
from fxhybrid.solvers.mps.plan_state import PlanCost, PlanState
from fxhybrid.solvers.mps.problem_tables import Ints

SHARPNESS = 200.0  # slots one part in so many below the peak weigh 1 / e of it
NEARLY = 0.99  # of the target: slots above that count as overloaded, so that moves reach below it
SCARCITY = 16  # power of height over target that says how scarce a slot's room is
ROWS_PER_PICK = 2000  # moves picked between two scorings: one, and one more for so many rows
MAX_EXAMINED = 200  # moves that one batch is picked from
MAX_FAILS = 24  # moves refused in a row before a search gives up
NO_GAIN = 1e-9  # of the step: seconds below that are no gain
LEAST_COST = 1e-6  # of the step: what a move that costs nothing counts as in bytes freed per second
BATCH_RELAX, BATCH_DESCEND, BATCH_TRIM = 8, 4, 8  # moves applied at once to begin with
LEAST_AT_ONCE, ROWS_PER_MOVE = 32, 100  # moves applied at once: at most one in so many rows, but the first in any case
ERROR_ROUNDING = 1e-9  # relative: what sums of differences may exceed the squared error limit by


class LocalSearch:
    """Searches from the plan of ``state``.

    Attributes:
        state: the present plan, evaluated.
        table: moves from it.
        max_error2: limit of the sum of squared errors.
        error_multiplier_s: seconds that one unit of squared error is worth.
        move_limit: the search ends when ``state`` has applied so many changes.
    """

    def __init__(self, state: PlanState, table: MoveTable, max_error2: float) -> None:
        self.state = state
        self.table = table
        self.max_error2 = max_error2
        self.error_multiplier_s = 0.0
        self.move_limit = 0
        self.most_at_once = max(LEAST_AT_ONCE, len(table.row) // ROWS_PER_MOVE)
        self.no_gain_s = NO_GAIN * state.tables.problem.step_s

    @property
    def exhausted(self) -> bool:
        """Whether the move budget is used up."""
        return self.state.n_applied >= self.move_limit

    @property
    def cost_s(self) -> float:
        """Overhead, and what the error counts by its multiplier."""
        return self.state.overhead_s + self.error_multiplier_s * self.state.error2

    def _costs(self, rows: Ints) -> Floats:
        """Returns the ``cost_s`` that each move of ``rows`` adds."""
        cost: Floats = self.table.seconds[rows] + self.error_multiplier_s * self.table.error2[rows]
        return cost

    def plan(self) -> EvaluatedPlan:
        """Returns the present plan."""
        return EvaluatedPlan(bytes(self.state.codes), self.state.cost())

    def go_to(self, codes: bytes, *, to_search: bool = True) -> bool:
        """Goes to a plan, ``to_search`` from there; returns whether it is a valid one within the error limit."""
        changed = self.state.apply(self.state.changes_to(codes))
        self.table.mark_stale(changed, at_once=to_search)
        return self.is_allowed()

    def is_allowed(self) -> bool:
        """Whether the present plan is valid and within the error limit."""
        return self.state.valid and self.state.error2 <= self.max_error2 * (1 + ERROR_ROUNDING)

    def _improve(
        self,
        batch: Batch,
        pick: Callable[[], tuple[list[int], Changes]],
        figure: Callable[[], float],
        *,
        until: Callable[[], bool] = lambda: False,
        patient: bool = True,
        accept: Callable[[], None] = lambda: None,
    ) -> None:
        """Applies the moves picked, and undoes those that do not lower the figure.

        Args:
            batch: how many are applied at once.
            pick: rows and changes to apply together; none where there is nothing to gain.
            figure: what falls.
            until: ends the search.
            patient: evaluates stale moves again before it gives up.
            accept: called after moves that stay applied.
        """
        value = figure()
        while not self.exhausted and not until():
            rows, changes = pick() if batch.fails < MAX_FAILS else ([], {})
            if not rows:
                if not (patient and self.table.stale):
                    return
                self.table.refresh()
                batch.fails = 0
                continue
            changed = self.state.apply(changes)
            lower = figure()
            if self.is_allowed() and lower < value:
                value = lower
                self.table.mark_stale(changed)
                batch.grow()
                accept()
            else:
                self.state.undo()
                batch.shrink(rows)

    def _batch(self, size: int, most: int | None = None) -> Batch:
        return Batch(np.zeros(len(self.table.row), bool), size, self.most_at_once if most is None else most)

    # -- at a multiplier -------------------------------------------------------------------------------------

    def relax(self, multiplier_s: float) -> None:
        """Makes moves until none makes ``cost_s + multiplier_s * smooth peak`` smaller.

        Args:
            multiplier_s: seconds that one byte of the peak is worth.
        """
        sharp = SHARPNESS / max(self.state.cost().peak_bytes, 1)
        batch = self._batch(BATCH_RELAX)
        self._improve(
            batch, lambda: self._improving(multiplier_s, sharp, batch), lambda: self._value(multiplier_s, sharp)
        )

    def _value(self, multiplier_s: float, sharp: float) -> float:
        heights = self.state.heights()
        top = int(heights.max())
        smooth = top + math.log(float(np.exp(sharp * (heights - top)).sum())) / sharp
        return self.cost_s + multiplier_s * smooth

    def _improving(self, multiplier_s: float, sharp: float, batch: Batch) -> tuple[list[int], Changes]:
        """Returns a batch of moves, the most useful first, that do not touch each other's tensors."""
        table, size = self.table, batch.size
        heights = self.state.heights()
        weights = sums(np.exp(sharp * (heights - heights.max())))

        def gains(rows: Ints) -> Floats:
            grown = table.weighed_change(lambda delta: np.expm1(np.clip(sharp * delta, -700.0, 200.0)), weights, rows)
            smooth = np.log(np.maximum(1.0 + grown / weights[-1], 1e-300)) / sharp
            gain: Floats = -(self._costs(rows) + multiplier_s * smooth)
            return gain

        wanted = table.possible(batch.banned, self.state.error2, self.max_error2)
        gain = gains(wanted)
        useful = np.flatnonzero(gain > self.no_gain_s)
        picks: list[int] = []
        for r in wanted[useful[lowest(-gain[useful], 4 * size)]].tolist():
            if len(picks) == 2 * size:
                break
            t = table.row[r][0]
            if t in table.stale:
                table.refresh((t,))
                rows = slice(table.rows_of[t].start, table.rows_of[t].stop)
                again = table.possible(batch.banned, self.state.error2, self.max_error2, rows)
                fresh = gains(again)
                if not len(fresh) or fresh.max() <= self.no_gain_s:
                    continue
                r = int(again[fresh.argmax()])
            picks.append(r)
        return self._together(picks, size)

    def _together(self, picks: list[int], size: int) -> tuple[list[int], Changes]:
        """Returns as many of ``picks`` as stay clear of each other and within the error limit."""
        table, error2 = self.table, self.state.error2
        rows: list[int] = []
        together: Changes = {}
        for r in picks:
            changes = table.changes[r]
            fits = error2 + table.error2[r] <= self.max_error2
            if fits and len(rows) < size and together.keys().isdisjoint(table.tables.near(changes, 1)):
                together.update(changes)
                error2 += float(table.error2[r])
                rows.append(r)
        return rows, together

    # -- to a target ---------------------------------------------------------------------------------------

    def descend(self, target: int) -> bool:
        """Makes moves down to a peak of at most ``target``; returns False if it got stuck on the way."""

        def reached() -> bool:
            return bool(self.state.heights().max() <= target)

        batch = self._batch(BATCH_DESCEND)
        self._improve(
            batch, lambda: self._lowering(target, batch), lambda: _excess(self.state.heights(), target), until=reached
        )
        return reached()

    def _lowering(self, target: int, batch: Batch) -> tuple[list[int], Changes]:
        """Returns a batch of moves of the highest score that do not touch each other's tensors."""
        table = self.table
        height = self.state.heights().astype(np.float64)
        error2 = self.state.error2
        rows: list[int] = []
        picked: Changes = {}
        busy = batch.banned.copy()
        at_once = 1 + len(table.row) // ROWS_PER_PICK
        while table.row and len(rows) < batch.size and height.max() > target:
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
                elif score[r] > 0.0 and not busy[r] and len(rows) < batch.size:
                    changes = table.changes[r]
                    busy[r] = True
                    if picked.keys().isdisjoint(table.tables.near(changes)):
                        picked.update(changes)
                        busy[table.rows_of[t].start : table.rows_of[t].stop] = True
                        error2 += float(table.error2[r])
                        rows.append(r)
                        table.add(height, r)
        return rows, picked

    def _scores(self, height: Floats, target: int, error2: float, busy: Bools) -> Floats:
        """Returns bytes freed at the overloaded slots per second of overhead, 0 where a move is invalid or ``busy``."""
        table = self.table
        over = np.maximum(height - NEARLY * target, 0.0)
        top = float(over.max())
        rows = table.possible(busy, error2, self.max_error2 * (1 + 1e-12))
        gain = table.weighed_change(lambda delta: np.minimum(-delta, top), sums(over / top), rows)
        rate = gain / np.maximum(self._costs(rows), LEAST_COST * self.state.tables.problem.step_s + 1e-30)
        score = np.zeros(len(table.row))
        score[rows] = np.maximum(rate, 0.0)
        return score

    def trim(self, target: int, seen: list[EvaluatedPlan] | None = None) -> None:
        """Makes moves that save time while the peak stays at or below ``target``; ``seen`` gets the plans passed."""

        def cost() -> float:
            return self.cost_s if self.state.heights().max() <= target else math.inf

        batch = self._batch(BATCH_TRIM) if seen is None else self._batch(1, 1)
        self._improve(
            batch,
            lambda: self._within_target(target, self._savers(target, batch.banned), batch.size),
            cost,
            patient=False,
            accept=lambda: None if seen is None else seen.append(self.plan()),
        )

    def _savers(self, target: int, banned: Bools) -> Ints:
        """Returns some moves that save time, those first that save most per byte where the room is scarce."""
        table = self.table
        wanted = np.flatnonzero(table.valid & ~banned)
        cost = self._costs(wanted)
        saving = cost < -self.no_gain_s
        wanted, cost = wanted[saving], cost[saving]
        total = sums((self.state.heights() / max(target, 1)) ** SCARCITY)
        taken = np.maximum(table.weighed_change(lambda delta: delta, total, wanted), 1.0)
        return wanted[lowest(cost / taken, MAX_EXAMINED)]

    def _within_target(self, target: int, order: Ints, size: int) -> tuple[list[int], Changes]:
        """Returns moves that should keep the target, apart from each other."""
        table = self.table
        height = self.state.heights().astype(np.float64)
        error2 = self.state.error2
        rows: list[int] = []
        picked: Changes = {}
        top = int(height.argmax())
        for r in order.tolist():
            if not table.keeps(height, top, r, target) or error2 + table.error2[r] > self.max_error2:
                continue
            t = table.row[r][0]
            stale = t in table.stale
            table.refresh((t,))
            cost = table.seconds[r] + self.error_multiplier_s * table.error2[r]
            if not table.valid[r] or cost >= 0.0 or (stale and not table.keeps(height, top, r, target)):
                continue
            changes = table.changes[r]
            if picked.keys().isdisjoint(table.tables.near(changes)):
                picked.update(changes)
                error2 += float(table.error2[r])
                table.add(height, r)
                top = int(height.argmax())
                rows.append(r)
                if len(rows) >= size:
                    break
        return rows, picked


def _excess(heights: Ints, target: int) -> float:
    """Returns how far the heights lie above the target, all slots counted."""
    over = np.maximum(heights - NEARLY * target, 0.0)
    return float((over * over).sum())


@dataclass(frozen=True)
class EvaluatedPlan:
    """Holds a plan's codes and its cost."""

    codes: bytes
    cost: PlanCost


def by_peak(plan: EvaluatedPlan) -> tuple[int, float]:
    """Returns a key that sorts plans by their peaks."""
    return plan.cost.peak_bytes, plan.cost.overhead_s


def undominated(evaluated: list[EvaluatedPlan]) -> list[EvaluatedPlan]:
    """Returns the plans that no other one dominates, the cheapest first; the first of ``evaluated`` is the start."""
    best: list[EvaluatedPlan] = []
    for plan in sorted(evaluated[1:], key=lambda p: (p.cost.overhead_s, p.cost.peak_bytes, p.cost.error2)):
        if plan.cost.peak_bytes < min(evaluated[0].cost.peak_bytes, best[-1].cost.peak_bytes if best else 1 << 62):
            best.append(plan)
    return best
