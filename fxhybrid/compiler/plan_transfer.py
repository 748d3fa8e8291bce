"""Actions by tensor name, in which form a plan is carried from one capture to another."""

from __future__ import annotations

import torch

from fxhybrid.errors import PlanMismatchError
from fxhybrid.ir.plan import Action, Actions, Plan
from fxhybrid.ir.problem import Problem
from fxhybrid.version import __version__


def versions() -> dict[str, str]:
    """Versions that a plan depends on."""
    return {"fxhybrid": __version__, "torch": torch.__version__.split("+")[0]}


def named_actions(problem: Problem, actions: Actions) -> dict[str, Action]:
    """The actions of ``problem``'s candidates by tensor name."""
    candidates = set(problem.candidates)
    return {problem.tensors[t].name: actions[t] for t in sorted(actions) if t in candidates}


def carried_actions(plan: Plan, problem: Problem, fingerprint: str) -> dict[int, Action]:
    """The actions of a plan from elsewhere on the graph of ``problem``.

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
    unknown = [name for name in plan.actions if name not in problem.index]
    if unknown:
        raise PlanMismatchError(f"the plan names tensors that this graph does not have: {unknown[:3]}")
    return {problem.index[name]: action for name, action in plan.actions.items()}
