"""What a call's plan must leave for the other calls of the same step: those that are pending, and those to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fxhybrid.capture.capture import Capture
from fxhybrid.compiler.call_state import CallState
from fxhybrid.compiler.pending_calls import PendingCall, pending_calls, plan_bytes, storages_of
from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.errors import BudgetError
from fxhybrid.profiling.optimizer_step import optimizer_bytes
from fxhybrid.profiling.state_bytes import gradient_bytes
from fxhybrid.units import format_bytes

STEPS = 64  # limits are rounded to this share of the budget, so that few states need a plan of their own
MARGIN = 2  # of these steps, left by an earlier call: one for its own rounding, one for that of the later call


@dataclass(frozen=True)
class Following:
    """Holds what later calls of a step needed at least, beyond what the earlier call and those before it held.

    Attributes:
        room_bytes: while a later call ran.
        after_bytes: while the earlier call's own backward pass ran.
    """

    room_bytes: int = 0
    after_bytes: int = 0


# By signature, and by the number of calls that were pending when it was called: what followed so far.
_FOLLOWING: WeakKeyDictionary[Capture, dict[int, Following]] = WeakKeyDictionary()


def call_state(state: PlanningState, model: nn.Module, tensors: Sequence[Tensor]) -> CallState:
    """Reads the state of a call that is about to be made.

    Args:
        state: of the call's signature.
        model: the user's.
        tensors: the call's arguments.

    Raises:
        BudgetError: with what pending calls hold, not even the smallest known plan fits.
    """
    accumulating = any(p.grad is not None for p in model.parameters())
    calls = pending_calls(next((p.device for p in model.parameters()), None))
    follows = _FOLLOWING.get(state.prepared.capture, {}).get(len(calls))
    if not calls and follows is None:
        return CallState(accumulating)
    unit = max(state.budget_bytes // STEPS, 1)
    found = CallState(accumulating)
    if calls:
        found = _Meeting(state, model, tensors, calls, accumulating).admit(unit)
    if follows is None:
        return found
    left = state.budget_bytes - state.extra_bytes(found) - MARGIN * unit
    return CallState(
        accumulating,
        found.pending_bytes,
        found.held_limit_bytes,
        (left - follows.room_bytes) // unit * unit,
        (left - follows.after_bytes) // unit * unit,
    )


@dataclass(frozen=True, eq=False)
class _Meeting:
    """Compares a call that is about to be made with those that are pending."""

    state: PlanningState
    model: nn.Module
    tensors: Sequence[Tensor]
    calls: Sequence[PendingCall]
    accumulating: bool

    def admit(self, unit: int) -> CallState:
        """Returns the state of the call, and remembers what it needs of the earlier ones."""
        own = storages_of([*self.model.parameters(), *self.model.buffers(), *self.tensors])
        older = self.state.extra_bytes(CallState(self.accumulating))
        problem = self.state.prepared.problem
        least = plan_bytes(problem, self.state.plans.smallest.actions)
        pending = _beside(self.model, own, self.calls, {}, ())
        needed = least.peak_bytes + older + pending - sum(_shrinkable(call) for call in self.calls)
        limits = []
        for i, call in enumerate(self.calls):
            later = sum(_shrinkable(other) for other in self.calls[i + 1 :])
            room = least.peak_bytes + older + pending - later
            room -= call.planned.pending_bytes + call.planned.chosen.held_bytes
            room += call.planned.budget_bytes - self.state.budget_bytes
            others = [other for other in self.calls if other is not call]
            beside = self._beside_backward(call, others, own)
            is_source = any(ref.cdata in own for ref, _ in call.held)  # then its backward pass comes after this one's
            held = 0 if is_source else least.held_bytes
            after = beside + held - later - call.planned.pending_bytes
            _remember(call, Following(room, after))
            kept = _older_gradients(call)
            limit = call.planned.budget_bytes - call.planned.chosen.backward_bytes - beside - kept
            limits.append((limit if limit < 0 else None) if is_source else limit)
            shrunk = sum(_shrinkable(other) for other in others)
            needed = max(needed, call.planned.least.backward_bytes + beside + kept + held - shrunk)
        found = CallState(self.accumulating, -(-pending // unit) * unit, _rounded(limits, unit))
        fits = least.peak_bytes + self.state.extra_bytes(found) <= self.state.budget_bytes
        if not fits or (found.held_limit_bytes is not None and least.held_bytes > found.held_limit_bytes):
            raise self._error(pending, needed + -(-needed * 4 // (STEPS - 4)))
        return found

    def _beside_backward(self, call: PendingCall, others: Sequence[PendingCall], own: dict[int, int]) -> int:
        """Returns what stands beside the backward half of a pending call; saved values of the new one left out."""
        model = call.planned.model()
        if model is None:
            return 0
        mine = {**storages_of([*model.parameters(), *model.buffers()]), **call.alive()}
        beside = _beside(model, mine, others, own, (self.model,))
        return beside + self.state.prepared.problem.tangent_bytes

    def _error(self, pending: int, needed: int) -> BudgetError:
        budget, count = self.state.budget_bytes, len(self.calls)
        calls = "1 earlier call has" if count == 1 else f"{count} earlier calls have"
        way_out = f"Raise the budget of each module that the step calls to {needed} ({format_bytes(needed)})"
        if needed <= budget:
            way_out = "Those were planned without this one; from now on they leave room: run the same step again"
        return BudgetError(
            f"the budget of {budget} bytes ({format_bytes(budget)}) cannot be met for this call: {calls} not had a "
            f"backward pass yet, for which {pending} bytes ({format_bytes(pending)}) are pending; with the smallest "
            f"known plan for every call the step takes {needed} bytes ({format_bytes(needed)}). {way_out}; or put the "
            "calls into one module, so that they are planned as one; or, where no backward pass is to come, drop or "
            "detach what the earlier calls returned",
            budget_bytes=budget,
            minimum_bytes=needed,
            minimum_lower_bound_bytes=min(self.state.plans.lower_bound_bytes, needed),
            holder="calls without a backward pass",
        )


def _beside(
    model: nn.Module,
    own: dict[int, int],
    calls: Sequence[PendingCall],
    more: dict[int, int],
    models: Sequence[nn.Module],
) -> int:
    """Counts what stands beside a call: storages, tangents to come, gradients and optimizer state.

    Args:
        model: of the call.
        own: its storages, which its plan counts.
        calls: the other ones.
        more: further storages beside it.
        models: further models that take part in the step.
    """
    found = dict(more)
    owners = [(call.planned.model(), call.planned.optimizer) for call in calls]
    owners += [(other, None) for other in models]
    tangents = 0
    for call in calls:
        found.update(call.alive())
        # an output that is an input here gets its tangent as a gradient of this call, which its plan counts
        passed_on = {ref.cdata: n_bytes for ref, n_bytes in call.held if ref.cdata in own}
        tangents += max(call.planned.tangent_bytes - sum(passed_on.values()), 0)
    others = {id(owner): owner for owner, _ in owners if owner is not None and owner is not model}
    optimizers = {id(o): o for owner, o in owners if o is not None and owner is not model}
    for other in others.values():
        found.update(storages_of([*other.parameters(), *other.buffers()]))
    parameters = {id(p) for owner, _ in owners if owner is not None for p in owner.parameters()}
    # autograd keeps the gradients of a shared parameter until those of all calls have arrived
    shared = [p.nbytes for p in model.parameters() if p.requires_grad and id(p) in parameters]
    return (
        sum(n_bytes for storage, n_bytes in found.items() if storage not in own)
        + tangents
        + sum(shared)
        + sum(map(gradient_bytes, others.values()))
        + sum(optimizer_bytes(optimizer).state_bytes for optimizer in optimizers.values())
    )


def _older_gradients(call: PendingCall) -> int:
    model = call.planned.model()
    parameters = () if model is None else model.parameters()
    return sum(storages_of(p.grad for p in parameters if p.grad is not None).values())


def _shrinkable(call: PendingCall) -> int:
    """Returns how much less the smallest plan would hold."""
    return call.planned.chosen.held_bytes - call.planned.least.held_bytes


def _rounded(limits: Iterable[int | None], unit: int) -> int | None:
    smallest = min((limit for limit in limits if limit is not None), default=None)
    return None if smallest is None else smallest // unit * unit


def _remember(call: PendingCall, seen: Following) -> None:
    known = _FOLLOWING.setdefault(call.planned.capture, {})
    old = known.get(call.position, Following())
    known[call.position] = Following(max(old.room_bytes, seen.room_bytes), max(old.after_bytes, seen.after_bytes))
