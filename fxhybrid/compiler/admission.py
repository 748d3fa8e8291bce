"""Admits a call beside those of the same step whose backward pass is still to come, and leaves room for later ones.

Each pending call holds saved values and outputs until its backward pass has run, and backward passes may run in any
order. So a new call fits a budget B if, with all that stands beside it,

* its own step fits:                                      peak + beside <= B
* each pending call's backward half fits, with what the new one holds then:  backward + beside + held <= B

An example in bytes: a model of 100, called twice with inputs of 10 under B = 700. A plan that peaks at 500, of which
250 are held, takes 250 + 10 + 500 = 760 when the second call runs: too much. One that peaks at 550 and holds 120 takes
120 + 10 + 500 = 630 if the second call runs by the first plan. The second call may hold what the first one's backward
half leaves: 700 - 550 - 10 = 140, so it takes the plan that holds 120 as well: 120 + 10 + 550 = 680.

In the first step the first call is planned as if it were alone, and holds 250. When the second one comes, it lets go of
what the plan that holds 120 would not store. What the second one needs at least is remembered for the first, which from
the next step on leaves that room by its plan. Where nothing helps, the error names the budget that all need at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fxhybrid.capture.capture import Capture
from fxhybrid.compiler.bytes_beside import Participant, beside_bytes, model_storages, older_gradient_bytes
from fxhybrid.compiler.call_state import CallState
from fxhybrid.compiler.least_plans import least_bytes, least_plans, search_compact
from fxhybrid.compiler.pending_calls import PendingCall, pending_calls, storages_of
from fxhybrid.compiler.planning_state import PlanningState, fits, search
from fxhybrid.errors import BudgetError
from fxhybrid.solvers.portfolio.known_plans import KnownPlans
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes
from fxhybrid.units import format_bytes

STEPS = 256  # limits are rounded to this share of the budget, so that few states need a plan of their own
MARGIN = 2  # of these steps, left by an earlier call: one for its own rounding, one for that of the later call
LOST = 4  # of these steps at most are lost together: twice two limits


@dataclass(frozen=True)
class Following:
    """Holds what followed a call so far, so that it leaves room.

    Attributes:
        n_others: how many calls were pending beside one that ran, at most.
        least: what the call itself needs by the plan that suits so many; it is not asked for less.
        room_bytes: what a later call needed at least while it ran, beyond what the earlier ones held.
        after_bytes: likewise, what stood beside the call's own backward pass.
    """

    n_others: int
    least: PlanBytes
    room_bytes: int
    after_bytes: int

    def joined(self, old: Following | None) -> Following:
        """Returns what followed at most, of meetings that were judged by the same plan."""
        if old is None or (old.n_others, old.least) != (self.n_others, self.least):
            return self
        room = max(self.room_bytes, old.room_bytes)
        return replace(self, room_bytes=room, after_bytes=max(self.after_bytes, old.after_bytes))


# By signature, and by the number of calls that were pending when it was called: what followed so far.
_FOLLOWING: WeakKeyDictionary[Capture, dict[int, Following]] = WeakKeyDictionary()


def admit(
    state: PlanningState, model: nn.Module, tensors: Sequence[Tensor], call: CallState
) -> tuple[PlanningState, CallState]:
    """Reads the state of a call that is about to be made, and makes sure that a plan for it is known.

    Args:
        state: of the call's signature.
        model: the user's.
        tensors: the call's arguments.
        call: what the plan depends on if no other call is pending.

    Returns:
        The state, with plans that were searched for; and what the plan depends on.

    Raises:
        BudgetError: with what pending calls hold, no known plan fits.
    """
    calls = pending_calls(next((p.device for p in model.parameters()), None))
    follows = _followed(state.prepared.capture, len(calls))
    unit = max(state.budget_bytes // STEPS, 1)
    if calls:
        own = Participant(model, model_storages(model) | storages_of(tensors))
        state, call = _Meeting(state, own, calls, call).admit(unit)
    return state, call if follows is None else _leaving_room(state, call, follows, unit)


def _followed(capture: Capture, position: int) -> Following | None:
    return _FOLLOWING.get(capture, {}).get(position)


def following_alone(capture: Capture) -> Following | None:
    """Returns what followed calls that were made while no other one was pending."""
    return _followed(capture, 0)


def _leaving_room(state: PlanningState, call: CallState, follows: Following, unit: int) -> CallState:
    left = state.budget_bytes - state.extra_bytes(call) - MARGIN * unit
    return replace(
        call,
        wanted_held_bytes=max((left - follows.room_bytes) // unit * unit, follows.least.held_bytes),
        wanted_backward_bytes=max((left - follows.after_bytes) // unit * unit, follows.least.backward_bytes),
    )


@dataclass(frozen=True, eq=False)
class _Pair:
    """Compares a pending call with the new one.

    Attributes:
        call: the pending one.
        least: what it needs by the plan that leaves most to the others.
        beside_bytes: what stands beside its backward half, without the new call's saved values and older gradients.
        is_source: whether it made an argument of the new call, whose backward pass then comes first.
    """

    call: PendingCall
    least: PlanBytes
    beside_bytes: int
    is_source: bool

    @property
    def spare_bytes(self) -> int:
        """How much less it would hold by that plan."""
        return self.call.planned.chosen.held_bytes - self.least.held_bytes

    @property
    def older_bytes(self) -> int:
        """Its model's older gradients, beside which the new ones stand."""
        return older_gradient_bytes(self.call.planned.model())

    @property
    def room_bytes(self) -> int:
        """Room for its backward half and what the new call holds."""
        return self.call.planned.budget_bytes - self.beside_bytes - self.older_bytes

    def held_limit(self) -> int | None:
        """Returns what the new call may hold for this one's backward half; None if there is no limit."""
        left = self.room_bytes - self.call.planned.chosen.backward_bytes
        return None if self.is_source and left >= 0 else left


@dataclass(frozen=True, eq=False)
class _Meeting:
    """Compares a call that is about to be made with those that are pending.

    Attributes:
        state: of its signature.
        own: its model and arguments.
        calls: the pending ones.
        alone: what the plan for the call would depend on without them.
    """

    state: PlanningState
    own: Participant
    calls: Sequence[PendingCall]
    alone: CallState

    def admit(self, unit: int) -> tuple[PlanningState, CallState]:
        """Returns the state of the call, and remembers what it needs of the earlier ones."""
        found = self._found(unit)
        state = search(self.state, found)
        is_met = fits(state, found)
        if not is_met:
            for plans in (state.plans, *(call.planned.plans for call in self.calls)):
                search_compact(plans)
            if self._shrink():
                found = self._found(unit)
                state = search(state, found)
                is_met = fits(state, found)
        needed = self._remember(state.plans)
        if not is_met:
            raise self._error(needed + -(-needed * LOST // (STEPS - LOST)))
        return state, found

    def _found(self, unit: int) -> CallState:
        """Reads what the plan for the call depends on."""
        limits = [limit for pair in self._pairs() if (limit := pair.held_limit()) is not None]
        held_limit = min(limits) // unit * unit if limits else None
        pending_bytes = -(-beside_bytes(self.own, self.calls) // unit) * unit
        return replace(self.alone, pending_bytes=pending_bytes, held_limit_bytes=held_limit)

    def _shrink(self) -> bool:
        """Lets pending calls drop what they can recompute; says whether any did."""
        n_others = self._n_others()
        shrunk = False
        for pair in self._pairs():
            targets = least_plans(pair.call.planned.plans, n_others)
            shrunk |= any(pair.call.shrink(actions, pair.room_bytes) for _, actions in targets)
        return shrunk

    def _remember(self, plans: KnownPlans) -> int:
        """Remembers what the call needs of each earlier one, and returns what all need at least."""
        pairs, n_others = self._pairs(), self._n_others()
        least = least_bytes(plans, n_others)
        running = least.peak_bytes + self.state.extra_bytes(self.alone)
        running += beside_bytes(self.own, self.calls)
        for i, pair in enumerate(pairs):
            later = sum(other.spare_bytes for other in pairs[i + 1 :])
            _remember(pair, n_others, running - later - self.state.budget_bytes, least.held_bytes - later)
        spare = sum(pair.spare_bytes for pair in pairs)
        return max(running - spare, *(_needed(pair, least, spare) for pair in pairs))

    def _n_others(self) -> int:
        """Returns how many calls were pending beside one that ran, now or before."""
        known = (_followed(call.planned.capture, call.position) for call in self.calls)
        return max([len(self.calls), *(follows.n_others for follows in known if follows is not None)])

    def _pairs(self) -> list[_Pair]:
        pairs, n_others = [], self._n_others()
        for call in self.calls:
            is_source = any(ref.cdata in self.own.storages for ref, _ in call.held)
            least = least_bytes(call.planned.plans, n_others)
            pairs.append(_Pair(call, least, self._beside_backward(call), is_source))
        return pairs

    def _beside_backward(self, call: PendingCall) -> int:
        model = call.planned.model()
        if model is None:
            return 0
        others = [other for other in self.calls if other is not call]
        pending = Participant(model, {**model_storages(model), **call.alive()})
        return beside_bytes(pending, others, self.own) + self.state.prepared.problem.tangent_bytes

    def _error(self, needed: int) -> BudgetError:
        pending = beside_bytes(self.own, self.calls)
        # that of an earlier call may be the one that does not hold
        budget = min(self.state.budget_bytes, *(call.planned.budget_bytes for call in self.calls))
        count = len(self.calls)
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


def _needed(pair: _Pair, least: PlanBytes, spare_bytes: int) -> int:
    """Returns what a pending call takes at least, in its own step and beside the new call in its backward half.

    Args:
        pair: with the pending call.
        least: what the new call needs.
        spare_bytes: how much less all pending calls would hold.
    """
    held = 0 if pair.is_source else least.held_bytes
    backward = pair.least.backward_bytes + pair.beside_bytes + held - (spare_bytes - pair.spare_bytes)
    return pair.older_bytes + max(backward, pair.least.peak_bytes)


def _remember(pair: _Pair, n_others: int, over_bytes: int, held_bytes: int) -> None:
    """Remembers for a pending call what the new one needs.

    Args:
        pair: with the pending call.
        n_others: how many calls are pending beside one that runs.
        over_bytes: what the new one takes while it runs, with all that stands beside it, over its budget.
        held_bytes: what the new one holds later, less what others hold too much now.
    """
    planned, position = pair.call.planned, pair.call.position
    room = over_bytes + planned.budget_bytes - planned.pending_bytes - planned.chosen.held_bytes
    after = pair.beside_bytes + held_bytes - planned.pending_bytes
    follows = Following(n_others, pair.least, room, after)
    _FOLLOWING.setdefault(planned.capture, {})[position] = follows.joined(_followed(planned.capture, position))
