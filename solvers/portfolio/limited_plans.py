"""Plans for a step that other calls share: limits of what is held between the halves and of the backward half's peak.

Such limits become one of the peak alone in a problem that differs from the step's in two constants: a pause between the
halves, an op that only needs room, and a larger base of the backward half. Any solver of the peak then keeps them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.program import Op
from fxhybrid.ir.schedule import lower
from fxhybrid.ir.simulator import simulate
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from fxhybrid.solvers.mps.polish import polish
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, add, forget, simulated

SEARCH_LIMIT_S = 2.0  # of each search; on the models of the tests the smallest peak is proven in a tenth of a second
PAUSES = (0.5, 0.75, 1.0, 1.5)  # room for the calls that follow, as shares of the smallest peak


@dataclass(frozen=True)
class PlanBytes:
    """Holds what a plan needs, by half of the step.

    Attributes:
        peak_bytes: of the whole step, resident bytes included.
        held_bytes: outputs and saved values between the two halves.
        backward_bytes: peak of the backward half, resident bytes included.
    """

    peak_bytes: int
    held_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Limits:
    """Limits what ``PlanBytes`` holds; None where there is no limit."""

    peak_bytes: int
    held_bytes: int | None = None
    backward_bytes: int | None = None

    def admits(self, needs: PlanBytes) -> bool:
        """Says whether a plan keeps all limits."""
        return (
            needs.peak_bytes <= self.peak_bytes
            and (self.held_bytes is None or needs.held_bytes <= self.held_bytes)
            and (self.backward_bytes is None or needs.backward_bytes <= self.backward_bytes)
        )


def plan_bytes(problem: Problem, actions: Actions) -> PlanBytes:
    """Simulates what a plan needs, by half of the step."""
    schedule = lower(problem, actions)
    timeline = simulate(problem, schedule)
    n = schedule.n_forward
    crosses = (timeline.birth < n) & (timeline.death >= n)
    held = sum(value.size_bytes for value, kept in zip(schedule.values, crosses, strict=True) if kept)
    backward = timeline.during_bytes[n:]
    return PlanBytes(timeline.peak_bytes, held, int(backward.max()) if len(backward) else timeline.peak_bytes)


def cheapest_within(known: KnownPlans, limits: Limits) -> KnownPlan | None:
    """Returns the cheapest known plan that keeps the limits."""
    while (plan := known.cheapest(limits.peak_bytes)) is not None:
        if limits == Limits(limits.peak_bytes) or limits.admits(plan_bytes(known.problem, plan.point.actions)):
            break
        known = forget(known, plan)
    return plan


def ensure_within(known: KnownPlans, limits: Limits) -> KnownPlans:
    """Makes sure that ``cheapest_within`` finds a plan, if any can be found; searches once for the same limits."""
    if limits in known.searched or known.fixed or cheapest_within(known, limits) is not None:
        return known
    known = replace(known, searched=known.searched | {limits})
    problem = known.problem
    held = limits.peak_bytes if limits.held_bytes is None else limits.held_bytes
    backward = limits.peak_bytes if limits.backward_bytes is None else min(limits.backward_bytes, limits.peak_bytes)
    if held < 0 or backward < problem.backward_base_bytes:
        return known
    pause_bytes = max(backward - problem.backward_base_bytes - held, 0)
    limited = _with_pause(problem, pause_bytes, backward_bytes=limits.peak_bytes - backward)
    actions = _least_peak(limited, known)
    if not limits.admits(plan_bytes(problem, actions)):
        return known
    cheaper = polish(limited, actions, limits.peak_bytes, max_error=known.max_error)
    return add(known, *(KnownPlan(simulated(problem, a), "min peak") for a in (actions, cheaper) if a is not None))


def compact_plans(known: KnownPlans) -> list[Actions]:
    """Finds plans that hold little between the halves, and peak low all the same."""
    smallest_bytes = known.smallest.peak_bytes
    pauses = [int(share * smallest_bytes) for share in PAUSES]
    return [_least_peak(_with_pause(known.problem, pause), known) for pause in pauses]


def _least_peak(problem: Problem, known: KnownPlans) -> Actions:
    solver = MinPeakSolver(time_limit_s=SEARCH_LIMIT_S)
    return solver.solve(problem, max_error=known.max_error, warm_start=_exact_smallest(known)).actions


def _exact_smallest(known: KnownPlans) -> Actions:
    within_error = [plan.point for plan in known.plans]
    return min(within_error, key=lambda point: point.peak_bytes).actions if within_error else {}


def _with_pause(problem: Problem, pause_bytes: int, backward_bytes: int = 0) -> Problem:
    """Returns the problem with a pause of that much room between its halves, and so much more in all of the second."""
    pause = Op("pause between the halves", (), (), 0.0, pause_bytes)
    tangents = problem.tangent_bytes + backward_bytes
    return replace(problem, backward=(pause, *problem.backward), tangent_bytes=tangents)
