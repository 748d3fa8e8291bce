"""What every solver takes and gives."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions, Compress, relative_gap
from fxhybrid.ir.problem import Problem


class Status(Enum):
    """Says how much is known about a result.

    OPTIMAL: proven best (gap closed). FEASIBLE: fits the budget. INFEASIBLE: the budget lies below a proven
    lower bound of the peak of plans that make each tensor at most once more. UNKNOWN: no plan found, but none
    ruled out.
    """

    OPTIMAL = "OPTIMAL"
    FEASIBLE = "FEASIBLE"
    INFEASIBLE = "INFEASIBLE"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class SolveResult:
    """Holds a solver's answer for one budget.

    Attributes:
        status: how much is known.
        actions: tensor index -> action; tensors not named keep the default of ``schedule.lower``. For
            INFEASIBLE and UNKNOWN the actions of the smallest peak found.
        peak_bytes: simulated peak of these actions.
        overhead_s: simulated added seconds of these actions.
        lower_bound_s: no plan within budget and error limit adds less.
        error: L2 norm of the errors of the chosen lossy codecs.
        solver: which solver it came from.
        solve_s: seconds spent.
        details: counts worth reporting (nodes, rows added, rounds).
        proof: for INFEASIBLE, why in words: the smallest reachable bytes, and the step and tensors that hold it.
    """

    status: Status
    actions: Mapping[int, Action]
    peak_bytes: int
    overhead_s: float
    lower_bound_s: float
    error: float
    solver: str
    solve_s: float
    details: Mapping[str, float] = field(default_factory=dict)
    proof: str = ""

    def gap(self, step_s: float) -> float:
        """Computes ``relative_gap`` in a step of ``step_s`` seconds."""
        return relative_gap(self.overhead_s, self.lower_bound_s, step_s)


@dataclass(frozen=True)
class FrontierPoint:
    """Holds one plan of a frontier, with its simulated figures."""

    actions: Actions
    peak_bytes: int
    overhead_s: float
    error: float


@dataclass(frozen=True)
class PlanFrontier:
    """Holds the Pareto frontier from save-all to the smallest peak found: the peak falls, the added time never does."""

    points: tuple[FrontierPoint, ...]

    def point_for(self, budget_bytes: int) -> FrontierPoint | None:
        """Returns the cheapest plan with a peak of at most ``budget_bytes``."""
        place = bisect_left(self.points, -budget_bytes, key=lambda point: -point.peak_bytes)
        return self.points[place] if place < len(self.points) else None


class Solver(Protocol):
    """Finds actions for a problem whose simulated peak is at most ``budget_bytes``."""

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """Finds the best actions; ``max_error`` bounds their ``plan_error``."""
        ...


def plan_error(problem: Problem, actions: Mapping[int, Action]) -> float:
    """Computes the L2 norm of the errors of the lossy codecs that ``actions`` choose and backward reads."""
    total = 0.0
    for t, action in actions.items():
        if isinstance(action, Compress):
            total += sum(o.error**2 for o in problem.tensors[t].codecs if o.codec == action.codec)
    return float(total**0.5)


def default_action(problem: Problem, t: int) -> Action:
    """Returns what ``schedule.lower`` does with a tensor that a plan does not name."""
    return RECOMPUTE if problem.producer[t] in problem.deferrable else SAVE
