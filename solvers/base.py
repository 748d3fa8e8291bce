"""What every solver takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from fxhybrid.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.problem import Problem

GAP_FLOOR_SHARE = 1e-3  # of the step: added seconds below that count as that in the gap


class Status(Enum):
    """How much is known about a result.

    OPTIMAL: proven best (gap closed). FEASIBLE: fits the budget. INFEASIBLE: the budget lies below a proven
    lower bound of the peak. UNKNOWN: no plan found, but none ruled out.
    """

    OPTIMAL = "OPTIMAL"
    FEASIBLE = "FEASIBLE"
    INFEASIBLE = "INFEASIBLE"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class SolveResult:
    """A solver's answer for one budget.

    Attributes:
        status: how much is known.
        actions: tensor index -> action; tensors not named keep the default of ``schedule.lower``. For
            INFEASIBLE and UNKNOWN the actions of the smallest peak found.
        peak_bytes: simulated peak of these actions.
        added_s: simulated added seconds of these actions.
        lower_bound_s: no plan within budget and error limit adds less.
        error: root of the sum of squared errors of the chosen lossy codecs.
        solver: which solver it came from.
        solve_s: seconds spent.
        details: counts worth reporting (nodes, rows added, rounds).
        proof: for INFEASIBLE, why in words: the smallest reachable bytes, and the step and tensors that hold it.
    """

    status: Status
    actions: Mapping[int, Action]
    peak_bytes: int
    added_s: float
    lower_bound_s: float
    error: float
    solver: str
    solve_s: float
    details: Mapping[str, float] = field(default_factory=dict)
    proof: str = ""

    def gap(self, step_s: float) -> float:
        """(added - bound) / max(added, 0.1 % of a step of ``step_s`` seconds)."""
        return (self.added_s - self.lower_bound_s) / max(self.added_s, GAP_FLOOR_SHARE * step_s, 1e-12)


class Solver(Protocol):
    """Finds actions for a problem whose simulated peak is at most ``budget_bytes``."""

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """The best actions found; ``max_error`` bounds the root of the sum of squared lossy errors."""
        ...


def plan_error(problem: Problem, actions: Mapping[int, Action]) -> float:
    """Root of the sum of squared errors of the lossy codecs that ``actions`` choose and backward reads."""
    total = 0.0
    for t, action in actions.items():
        if isinstance(action, Compress):
            total += sum(o.error**2 for o in problem.tensors[t].codecs if o.codec == action.codec)
    return float(total**0.5)


def default_action(problem: Problem, t: int) -> Action:
    """What ``schedule.lower`` does with a tensor that a plan does not name."""
    return RECOMPUTE if problem.producer[t] in problem.deferrable else SAVE
