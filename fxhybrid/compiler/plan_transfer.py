"""Plan transfer: actions by tensor name, in which form a plan goes from one capture to another."""

from __future__ import annotations

import torch

from fxhybrid.capture.step import Step, StepCall
from fxhybrid.errors import PlanError, PlanMismatchError
from fxhybrid.ir.plan import Action, Actions, Plan
from fxhybrid.ir.problem import Problem
from fxhybrid.options import Options
from fxhybrid.passes.channels_last import channels_last_groups
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.passes.traced import Traced
from fxhybrid.pipeline import trace_plain
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, simulated
from fxhybrid.version import __version__


def versions() -> dict[str, str]:
    """Returns the versions that a plan depends on."""
    return {"fxhybrid": __version__, "torch": torch.__version__.split("+")[0]}


def named_actions(problem: Problem, actions: Actions) -> dict[str, Action]:
    """Names the actions of ``problem``'s candidates by tensor."""
    candidates = set(problem.candidates)
    return {problem.tensors[t].name: actions[t] for t in sorted(actions) if t in candidates}


def check_origin(plan: Plan, fingerprint: str) -> None:
    """Refuses a plan that was not made for this graph, here.

    Raises:
        PlanMismatchError: another graph, other shapes or other versions.
    """
    if plan.graph_fingerprint != fingerprint:
        raise PlanMismatchError(
            f"the plan was made for graph {plan.graph_fingerprint}, this model with these inputs is "
            f"{fingerprint}: other layers, shapes, types or options; plan again with fxhybrid.plan"
        )
    here = versions()
    if dict(plan.versions) != here:
        raise PlanMismatchError(f"the plan was made with {dict(plan.versions)}, here are {here}; plan again")


def bind_actions(plan: Plan, problem: Problem, fingerprint: str) -> dict[int, Action]:
    """Binds the actions of a plan from another capture to the tensors of ``problem``.

    Raises:
        PlanMismatchError: another graph, other shapes or other versions.
    """
    check_origin(plan, fingerprint)
    unknown = [name for name in plan.actions if name not in problem.index]
    if unknown:
        raise PlanMismatchError(f"the plan names tensors that this graph does not have: {unknown[:3]}")
    return {problem.index[name]: action for name, action in plan.actions.items()}


def simulate_transferred(problem: Problem, plan: Plan, actions: Actions) -> KnownPlan:
    """Simulates a transferred plan, whose ``actions`` have other figures on this device.

    Raises:
        PlanMismatchError: an action cannot be carried out here.
    """
    try:
        point = simulated(problem, actions)
    except PlanError as error:
        raise PlanMismatchError(
            f"the plan cannot be carried out here: {error}; plan again with fxhybrid.plan"
        ) from error
    return KnownPlan(point, plan.solver, solve_s=plan.solve_s)


def trace_for(plan: Plan, step: Step, call: StepCall, options: Options) -> Traced:
    """Captures a step in the layouts that a plan was made for, unless the options rule them out.

    Raises:
        PlanMismatchError: it was made for another graph or version, or in layouts that are ruled out.
    """
    traced = trace_plain(step, call, options)
    check_origin(plan, traced.fingerprint)
    return in_layout_of(plan, traced, options)


def in_layout_of(plan: Plan, traced: Traced, options: Options) -> Traced:
    """Returns a captured step in the layouts that a plan was made for.

    Raises:
        PlanMismatchError: there are none such, or the options rule them out.
    """
    if plan.channels_last == traced.channels_last:
        return traced
    known = {group.number for group in channels_last_groups(traced.capture.joint)}
    if not known.issuperset(plan.channels_last):
        raise PlanMismatchError(
            f"the plan runs groups {plan.channels_last} of operators in channels_last; here are {sorted(known)}; "
            "plan again with fxhybrid.plan"
        )
    if plan.channels_last and not options.reordered:
        raise PlanMismatchError(
            "the plan runs convolutions in channels_last, which rounds otherwise than eager does: "
            f'compression={options.compression!r} rules that out; pass exact="reordered", or plan again'
        )
    return traced.in_layout(plan.channels_last)


def expected_by(traced: Traced, plan: Plan) -> ExpectedBackward:
    """Returns the backward pass that a plan was made for.

    Raises:
        PlanMismatchError: it was made for another graph or version.
    """
    check_origin(plan, traced.fingerprint)
    return traced.expected(plan.without_gradient, plan.dropped)
