"""The cutting-plane loop of all integer programs here: memory rows as lazy constraints, separated by simulation.

A program with a row for each program point of each plan would be far too large. So the loop starts with few rows (the
restricted master program), solves it, simulates the plan found, and adds rows for the program points at which the
simulator finds more memory than the objective allows (violated lazy constraints), until there are none. Rows not added
yet only enlarge the program, so each solve's bound is one for the whole problem.

Where all violated program points have their rows, these undercount. What to do then is up to the objective.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fxhybrid.ir.plan import Action, Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule, lower
from fxhybrid.ir.simulator import Timeline, simulate
from fxhybrid.solvers.base import plan_error
from fxhybrid.solvers.ilp.memory_rows import MemoryRows
from fxhybrid.solvers.ilp.model import IlpModel
from fxhybrid.solvers.ilp.presolve import completed, reached

if TYPE_CHECKING:
    from fxhybrid.solvers.ilp.backend import Answer

ROWS_PER_ROUND = 12
START_SHARE = 0.97  # of the limit: rows for the start are made where known plans are higher than that


@dataclass(frozen=True)
class SimulatedPlan:
    """Holds a plan with all that the simulator says about it."""

    actions: Actions
    schedule: Schedule
    timeline: Timeline
    error: float

    @property
    def peak_bytes(self) -> int:
        """The simulated peak."""
        return self.timeline.peak_bytes

    @property
    def overhead_s(self) -> float:
        """The simulated seconds beyond the save-all step."""
        return self.timeline.overhead_s


def simulated_plan(problem: Problem, actions: Actions) -> SimulatedPlan:
    """Simulates a plan.

    Raises:
        PlanError: the actions are none for this problem.
    """
    schedule = lower(problem, actions)
    return SimulatedPlan(actions, schedule, simulate(problem, schedule), plan_error(problem, actions))


class Stopwatch:
    """Measures from its making on how much of a time limit is left."""

    def __init__(self, limit_s: float) -> None:
        self._started = time.perf_counter()
        self._limit_s = limit_s

    def spent_s(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self._started

    def left_s(self) -> float:
        """Returns the seconds until the time limit; negative beyond it."""
        return self._limit_s - self.spent_s()


@dataclass(frozen=True)
class Effort:
    """Says how exactly one solve is to be done.

    Attributes:
        gap: relative gap at which the backend may stop.
        gap_abs: the same in the objective's units.
        time_share: share of the time left that it may take.
    """

    gap: float = 0.0
    gap_abs: float = 0.0
    time_share: float = 1.0


@dataclass
class MasterProgram:
    """Holds the program with the memory rows made so far.

    Attributes:
        model: variables and all other rows.
        rows: memory rows.
        apart: instructions between two rows made from one plan: neighbours say nearly the same.
        counts: rounds, rows, columns, nodes and plans forbidden, for reports.
    """

    model: IlpModel
    rows: MemoryRows
    apart: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def solve(self, start: Actions | None, effort: Effort, time_limit_s: float) -> Answer:
        """Solves the program as it is; ``start`` is a plan to start from."""
        problem, program = self.model.problem, self.model.program
        values = {} if start is None else self.model.start(reached(problem, start))
        limit_s = max(time_limit_s, 0.0)
        answer = program.solve(values, gap=effort.gap, gap_abs=effort.gap_abs, time_limit_s=limit_s)
        self.count("rounds")
        self.count("nodes", answer.nodes)
        self.counts["rows"] = len(self.rows.rows)
        self.counts["columns"] = program.columns
        return answer

    def separate(self, plan: SimulatedPlan, above_bytes: float) -> bool:
        """Adds rows where a plan is highest above a limit; False if all program points there have theirs."""
        return self.rows.add_highest(
            plan.schedule, plan.timeline, above_bytes=above_bytes, most=ROWS_PER_ROUND, apart=self.apart
        )

    def forbid(self, found: dict[int, Action]) -> None:
        """Cuts off a plan that the program found, with all that differ only where backward never comes."""
        self.count("forbidden")
        problem, decided = self.model.problem, self.model.presolved.decided
        seen = reached(problem, completed(problem, found))
        self.model.forbid(found, [t for t in decided if t in seen])

    def count(self, name: str, more: int = 1) -> None:
        """Adds to one of the counts."""
        self.counts[name] = self.counts.get(name, 0) + more


class Objective(Protocol):
    """Says what is minimised: which heights violate it, what a plan and a bound are worth, and when to stop."""

    def closed(self) -> bool:
        """Returns whether no further round is needed."""
        ...

    def effort(self) -> Effort:
        """Returns how exactly to solve next."""
        ...

    def start(self) -> Actions | None:
        """Returns a plan to start the next solve from."""
        ...

    def take_bound(self, bound: float) -> None:
        """Takes in the program's bound, in its own units; infinity where it has no solution."""
        ...

    def limit_bytes(self) -> float:
        """Returns the height above which the plan just found violates its memory constraints."""
        ...

    def take_plan(self, plan: SimulatedPlan) -> bool:
        """Takes in a plan that the program found; returns whether its error is within the limit."""
        ...

    def stops_without_solution(self) -> bool:
        """Returns whether to stop after a solve that gave no plan."""
        ...

    def stops_without_cuts(self, found: dict[int, Action], plan: SimulatedPlan) -> bool:
        """Handles a plan from which no new row follows; returns whether to stop."""
        ...


def run_cutting_planes(master: MasterProgram, objective: Objective, watch: Stopwatch) -> None:
    """Solves, simulates and separates until the objective is closed or the time is up."""
    model = master.model
    while not objective.closed() and watch.left_s() > 0 and not model.program.contradiction:
        effort = objective.effort()
        answer = master.solve(objective.start(), effort, effort.time_share * watch.left_s())
        objective.take_bound(answer.bound)
        if not answer.found:
            if objective.stops_without_solution():
                return
            continue
        found = model.actions()
        limit_bytes = objective.limit_bytes()
        plan = simulated_plan(model.problem, completed(model.problem, found))
        within_error = objective.take_plan(plan)
        if within_error and master.separate(plan, limit_bytes):
            continue
        if objective.stops_without_cuts(found, plan):
            return
