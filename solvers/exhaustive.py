"""Exhaustive search: the optimum of small problems, which the other solvers are tested against.

Problem
    Among all plans within the error limit, the one that adds the fewest seconds within the budget.

Data
    The candidates of a problem, at most ``max_tensors``, each with its actions.

Variables
    One action per candidate that backward comes to, directly or through a recomputed op. What it does not come
    to needs no decision, so plans that differ only there are one plan.

Model
    Tensors are decided from the last op to the first: when the turn of t comes, every op that reads t is decided,
    so it is known whether t is reached. Each complete plan is simulated. Nothing is left out but invalid plans
    (an op recomputed that must run once, or from a lossy form) and those beyond the error limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxhybrid.errors import InvalidArgument
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.ir.problem import CodecOption, Problem, check_problem
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import simulate
from fxhybrid.solvers.base import SolveResult, Status, default_action, plan_error
from fxhybrid.solvers.bounds import holder_in_words
from fxhybrid.units import format_bytes

ROUNDING = 1e-12  # of the squared error left, which is a difference of floats


@dataclass(frozen=True)
class Tried:
    """Holds one plan with its simulated figures."""

    actions: Mapping[int, Action]
    peak_bytes: int
    overhead_s: float
    holder: str


class OracleSolver:
    """Tries every plan; exact, and slow beyond ten candidate tensors or so.

    Args:
        max_tensors: problems with more candidates are refused.
    """

    def __init__(self, *, max_tensors: int = 10) -> None:
        self.max_tensors = max_tensors

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        """Finds the best plan of all; see ``Solver``.

        Raises:
            ProblemError: the problem is malformed.
            InvalidArgument: the problem has more candidates than ``max_tensors``.
        """
        started = time.perf_counter()
        best, count = self.best_plans(problem, max_error=max_error)
        fitting = [plan for plan in best if plan.peak_bytes <= budget_bytes]
        shown = fitting[0] if fitting else best[-1]
        proof = (
            f"the smallest peak of all {count} plans is {format_bytes(shown.peak_bytes)} "
            f"({shown.peak_bytes} bytes), held by {shown.holder}"
        )
        return SolveResult(
            Status.OPTIMAL if fitting else Status.INFEASIBLE,
            shown.actions,
            shown.peak_bytes,
            shown.overhead_s,
            shown.overhead_s,
            plan_error(problem, shown.actions),
            "oracle",
            time.perf_counter() - started,
            {"plans": count},
            "" if fitting else proof,
        )

    def best_plans(self, problem: Problem, *, max_error: float) -> tuple[list[Tried], int]:
        """Finds the Pareto frontier of all plans, fastest first, and how many there are.

        Raises:
            ProblemError: the problem is malformed.
            InvalidArgument: the problem has more candidates than ``max_tensors``.
        """
        check_problem(problem)
        if len(problem.candidates) > self.max_tensors:
            raise InvalidArgument(
                f"the problem has {len(problem.candidates)} candidate tensors; the oracle tries every plan for at "
                f"most {self.max_tensors}: use IlpSolver, or raise max_tensors if you can wait"
            )
        tried = [_tried(problem, actions) for actions in every_plan(problem, max_error)]
        best: list[Tried] = []
        for plan in sorted(tried, key=lambda plan: (plan.overhead_s, plan.peak_bytes)):
            if not best or plan.peak_bytes < best[-1].peak_bytes:
                best.append(plan)
        return best, len(tried)


def every_plan(problem: Problem, max_error: float) -> Iterator[dict[int, Action]]:
    """Yields every plan within the error limit; tensors that it does not reach, or leaves as they are, are left out."""
    order = sorted(problem.candidates, key=lambda t: (-problem.producer[t], t))
    for actions in _complete(problem, order, 0, {}, max_error**2):
        yield {t: a for t, a in actions.items() if a is not default_action(problem, t)}


def _complete(
    problem: Problem, order: list[int], place: int, chosen: dict[int, Action], error2: float
) -> Iterator[dict[int, Action]]:
    """Yields all ways to decide ``order[place:]`` after ``chosen``, with ``error2`` of squared error left."""
    if place == len(order):
        yield dict(chosen)
        return
    t = order[place]
    rerun = any(
        t in op.inputs and any(chosen.get(q) is RECOMPUTE for q in op.outputs)
        for op in problem.forward[problem.producer[t] + 1 :]
    )
    if t not in problem.backward_reads and not rerun:
        yield from _complete(problem, order, place + 1, chosen, error2)
        return
    for action, option in _actions(problem, t):
        left = error2 - (option.error**2 if option else 0.0)
        if left < -ROUNDING * error2 or (option and not option.lossless and rerun):
            continue
        chosen[t] = action
        yield from _complete(problem, order, place + 1, chosen, left)
        del chosen[t]


def _actions(problem: Problem, t: int) -> Iterator[tuple[Action, CodecOption | None]]:
    yield SAVE, None
    for option in problem.tensors[t].codecs:
        yield Compress(option.codec), option
    if problem.forward[problem.producer[t]].recomputable:
        yield RECOMPUTE, None


def _tried(problem: Problem, actions: Mapping[int, Action]) -> Tried:
    schedule = lower(problem, actions)
    timeline = simulate(problem, schedule)
    return Tried(actions, timeline.peak_bytes, timeline.overhead_s, holder_in_words(problem, schedule, timeline))
