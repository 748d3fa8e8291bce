"""Lets calls of one model that wait for their backward pass together leave room for each other.

The plan of a call knows nothing of others. How many waited when a call began is remembered by kind of call; from then
on each takes the cheapest plan by which so many wait beside one that runs.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from fxhybrid.errors import BudgetError
from fxhybrid.segments.path import Path
from fxhybrid.segments.planned_run import PlannedPart
from fxhybrid.segments.sequence_plans import SequencePlan
from fxhybrid.units import format_bytes

AGAIN = "Those were planned without this one; from now on they leave room: run the same step again"


@dataclass(frozen=True)
class Together:
    """Says how many calls wait beside one that runs.

    Attributes:
        n_others: how many.
        each_bytes: inputs of each, and gradients of what it returns.
        once_bytes: older gradients, and those that the calls share.
    """

    n_others: int
    each_bytes: int
    once_bytes: int


@dataclass(eq=False)
class CallsTogether:
    """Remembers how many calls waited, by kind of call."""

    most: dict[Hashable, int] = field(default_factory=dict)

    def note(self, kind: Hashable, n_others: int) -> int:
        """Notes how many calls wait beside one of a kind; returns the most so far."""
        self.most[kind] = max(self.most.get(kind, 0), n_others)
        return self.most[kind]

    @staticmethod
    def fitting(path: Path, budget_bytes: int, together: Together) -> tuple[SequencePlan, list[PlannedPart]] | None:
        """Returns the cheapest plan of a path by which all calls fit; None if there is none."""
        key = budget_bytes, together
        if key not in path.chosen:
            limit = budget_bytes - together.once_bytes
            offered = path.plans.together(together.n_others, together.each_bytes)
            plan = next((plan for needed, plan in offered if needed <= limit), None)
            if plan is None:
                return None
            path.chosen[key] = plan, path.parts(plan)
        return path.chosen[key]

    @staticmethod
    def error(path: Path, budget_bytes: int, together: Together, waiting_bytes: int) -> BudgetError:
        """Builds the error for a call that does not fit beside those that wait."""
        offered = path.plans.together(together.n_others, together.each_bytes)
        needed = min(needed for needed, _ in offered) + together.once_bytes
        way_out = AGAIN if needed <= budget_bytes else f"Raise the budget to {needed} ({format_bytes(needed)})"
        return BudgetError(
            f"the budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) cannot be met for this call: earlier "
            f"ones wait for their backward pass, for which {waiting_bytes} bytes ({format_bytes(waiting_bytes)}) are "
            f"pending; by the plan that suits them best {together.n_others + 1} calls take {needed} bytes "
            f"({format_bytes(needed)}). {way_out}; or put the calls into one module, so that they are planned as one",
            budget_bytes=budget_bytes,
            minimum_bytes=needed,
            minimum_lower_bound_bytes=min(path.plans.known.lower_bound_bytes, needed),
            holder="calls without a backward pass",
        )
