"""Memory rows of the integer program: one program point of the schedule, one row.

``forward_rows`` and ``backward_rows`` say what counts at a program point; here rows are made, tightened and read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule
from fxhybrid.ir.simulator import Timeline
from fxhybrid.solvers.ilp.backward_rows import BackwardTerms
from fxhybrid.solvers.ilp.forward_rows import ForwardTerms
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import Presolved, saved_bytes
from fxhybrid.solvers.ilp.program_points import ProgramPoint, program_points_of

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Term

ROW_SCALE = 1e3  # the budget in the rows' units


class MemoryRows:
    """Adds memory rows to a model, and tightens them; ``spread`` is bytes on top of the budget, times a variable."""

    def __init__(self, model: IlpModel, budget_bytes: int, *, spread: Term = (0.0, 0)) -> None:
        self.model = model
        self.spread = spread
        self.problem: Problem = model.problem
        self.presolved: Presolved = model.presolved
        self.budget_bytes = budget_bytes
        self.rows: dict[ProgramPoint, Any] = {}
        self._rooms: dict[ProgramPoint, float] = {}
        self.unit = max(budget_bytes, 1) / ROW_SCALE
        self._forward = ForwardTerms(model)
        self._backward = BackwardTerms(model)
        self._pruned_bytes: tuple[list[int], list[int]] | None = None

    def add(self, at: ProgramPoint) -> None:
        """Adds the row of one program point."""
        terms, base = (self._forward if at.forward else self._backward).of(at)
        scaled = [(b / self.unit, literal) for b, literal in [(-self.spread[0], self.spread[1]), *terms]]
        rhs = (self.budget_bytes - base - self._room_for_pruned(at)) / self.unit
        self.rows[at] = row = self.model.program.at_most(scaled, rhs)
        if row is not None:
            self._rooms[at] = -row.constant * self.unit + self._room_for_pruned(at)

    def add_highest(
        self, schedule: Schedule, timeline: Timeline, *, above_bytes: float, most: int, apart: int = 0
    ) -> bool:
        """Adds rows for the highest program points of a plan that have none; False if all of these have theirs.

        Args:
            schedule: of the plan.
            timeline: of the schedule.
            above_bytes: lower program points do not matter.
            most: rows added at most.
            apart: instructions between two of them: neighbours say nearly the same.
        """
        during, program_points = timeline.during_bytes, program_points_of(self.problem, schedule)
        chosen: dict[int, ProgramPoint] = {}
        for at in np.argsort(-during, kind="stable").tolist():
            if during[at] <= above_bytes or len(chosen) == most:
                break
            new = program_points[at] not in self.rows and program_points[at] not in chosen.values()
            if new and all(abs(at - c) > apart for c in chosen):
                chosen[at] = program_points[at]
        for program_point in chosen.values():
            self.add(program_point)
        return bool(chosen)

    def duals(self) -> float:
        """Returns by how much the objective falls for one byte more in every row; after a linear solve."""
        return -sum(row.pi or 0.0 for row in self.rows.values() if row is not None) / self.unit

    def tighten(self, at: ProgramPoint, excess_bytes: float) -> bool:
        """Takes room from a row; False where the row holds no variable."""
        row = self.rows[at]
        if row is None:
            return False
        row.changeRHS(-row.constant - excess_bytes / self.unit)
        return True

    def release(self) -> None:
        """Gives every row its full room back, so that bounds are true again."""
        self._pruned_bytes = None
        for at, room in self._rooms.items():
            self.rows[at].changeRHS(room / self.unit)

    def keep_room_for_pruned(self) -> bool:
        """Keeps room from now on for the pruned tensors, which are saved; False if that was so already."""
        if self._pruned_bytes is not None or not self.presolved.pruned:
            return False
        self._pruned_bytes = saved_bytes(self.problem, self.presolved)
        for at in self.rows:
            self.tighten(at, self._room_for_pruned(at))
        return True

    def _room_for_pruned(self, at: ProgramPoint) -> int:
        if self._pruned_bytes is None:
            return 0
        forward, backward = self._pruned_bytes
        return forward[at.op] if at.forward else backward[at.op]
