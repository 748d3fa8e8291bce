"""Remote plans: for another device, with bytes from this capture and seconds from the device's profile."""

from __future__ import annotations

from fxhybrid.devices.device_profile import DeviceProfile, problem_on
from fxhybrid.devices.op_work import StepWork
from fxhybrid.ir.plan import GradientError, Plan, Tier
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans, polish_for


def plan_for_device(
    problem: Problem, work: StepWork, base: Plan, profile: DeviceProfile, budget_bytes: int, *, max_error: float
) -> Plan:
    """Chooses the cheapest known plan for another device.

    Args:
        problem: the step as captured here.
        work: of the same step.
        base: any plan for it; gives fingerprint and versions.
        profile: the other device.
        budget_bytes: of its memory.
        max_error: limit of the estimated gradient error.

    Raises:
        BudgetError: no known plan fits.
    """
    there = problem_on(problem, work, profile)
    known = polish_for(frontier_plans(there, max_error=max_error), budget_bytes)
    plan = known.cheapest(budget_bytes)
    if plan is None:
        raise known.budget_error(budget_bytes, 0)
    return plan_of(there, plan.point, base, budget_bytes, slowdown=profile.slowdown)


def plan_of(problem: Problem, point: FrontierPoint, base: Plan, budget_bytes: int, *, slowdown: float = 1.0) -> Plan:
    """Makes a point of a remote frontier a plan that can be sent there.

    Args:
        problem: with the other device's seconds.
        point: of a frontier for it.
        base: any plan for the same step.
        budget_bytes: that the plan answers.
        slowdown: seconds are multiplied by this.
    """
    candidates = set(problem.candidates)
    return Plan(
        budget_bytes=budget_bytes,
        peak_bytes=point.peak_bytes,
        added_s=point.overhead_s * slowdown,
        lower_bound_s=0.0,
        step_s=problem.step_s * slowdown,
        gradient_error=GradientError(point.error, "estimated" if point.error else "exact"),
        status="FEASIBLE",
        solver="mps",
        solve_s=0.0,
        actions={problem.tensors[t].name: point.actions[t] for t in sorted(point.actions) if t in candidates},
        graph_fingerprint=base.graph_fingerprint,
        versions=base.versions,
        device="estimated for another device",
        channels_last=base.channels_last,
        exactness=Tier.LOSSY if point.error else Tier.LOSSLESS if base.exactness is Tier.LOSSLESS else Tier.REORDERED,
    )
