"""The largest batch whose training step fits a budget, from one symbolic capture.

A step is planned in full for a few samples. At other batch sizes the graph is made concrete and the plans that are
known are simulated. The result is planned in full, too: what runs for that is what any first call runs, if memory
allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.capture.step import Step, StepCall, check_call
from fxhybrid.capture.symbolic import Sizes
from fxhybrid.compiler.planning_state import PlanningState, plan_signature, with_smallest
from fxhybrid.compiler.signature import Signature
from fxhybrid.compiler.signature_cache import SignatureCache
from fxhybrid.compiler.size_family import SizeFamily
from fxhybrid.errors import InvalidArgument, ProfileError
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared
from fxhybrid.profiling.state_bytes import storage_bytes
from fxhybrid.solvers.portfolio.known_plans import simulated

SAMPLES, MORE_SAMPLES = 4, 6  # of the calls that are traced first; sizes of 0 and 1 are traced apart
FAR = 4  # times the samples that were planned; beyond, they are planned again nearer to the result
MOST_PROBES, MOST_ROUNDS = 24, 4
NOT_SYMBOLIC = (
    "the step cannot be traced for batches of other sizes than {samples}: it depends on the number of samples; plan "
    "each size by fxhybrid.plan instead"
)

MakeCall = Callable[[int], StepCall]


def largest_samples(step: Step, make_call: MakeCall, options: Options) -> int:
    """Returns the largest number of samples for which a known plan keeps the budget.

    Args:
        step: model and loss.
        make_call: makes the call with a number of samples; called for few samples, and for the result.
        options: of planning, with a budget in bytes or ``"auto"``.

    Raises:
        BudgetError: not even one sample fits.
        InvalidArgument: the budget depends on the batch, or the step is another one for each number of samples.
    """
    few, more = SAMPLES, MORE_SAMPLES
    for _ in range(MOST_ROUNDS):
        call = make_call(few)
        check_call(call, step.model)
        state = with_smallest(plan_signature(step, call, options, None, None))
        if state.minimum_bytes > state.budget_bytes:
            return _fewer(step, make_call, options, state.budget_bytes, few)
        batches = _Batches.of(step, make_call, (few, more), state)
        fitting, per_sample = _search(batches, state.budget_bytes)
        if fitting <= more or (fitting <= FAR * few and batches.holds(make_call(fitting))):
            return _verified(step, make_call, options, state.budget_bytes, fitting, per_sample)
        few, more = fitting // 2, fitting  # for few samples other plans are small, and kernels may be others
    raise InvalidArgument(NOT_SYMBOLIC.format(samples=few))


def _fewer(step: Step, make_call: MakeCall, options: Options, budget_bytes: int, few: int) -> int:
    """Tries fewer samples than were planned, each by itself."""
    for samples in range(few - 1, 0, -1):
        state = with_smallest(plan_signature(step, make_call(samples), options, budget_bytes, None))
        if state.minimum_bytes <= budget_bytes:
            return samples
    raise state.plans.budget_error(budget_bytes, 0)


def _verified(
    step: Step, make_call: MakeCall, options: Options, budget_bytes: int, samples: int, per_sample: float
) -> int:
    """Plans the batch as ``compile`` will, which finds what is kept of it; takes samples away until a plan fits."""
    while samples > 1:
        state = plan_signature(step, make_call(samples), options, budget_bytes, None)
        over_bytes = state.minimum_bytes - budget_bytes
        if over_bytes <= 0:
            break
        samples = max(samples - max(math.ceil(over_bytes / per_sample), 1), 1)
    return samples


def _search(batches: _Batches, budget_bytes: int) -> tuple[int, float]:
    """Brackets the largest batch that fits, by the bytes that each further sample took; returns these, too."""
    few, more = batches.traced
    fitting, at_fitting = few, batches.least_bytes(few)
    per_sample = max((batches.least_bytes(more) - at_fitting) / (more - few), 1.0)
    too_large: int | None = None
    for _ in range(MOST_PROBES):
        room = int((budget_bytes - at_fitting) / per_sample)
        samples = fitting + max(room, 1)
        if too_large is not None:
            samples = min(samples, (fitting + too_large + 1) // 2, too_large - 1)
        if samples <= fitting:
            break
        found = batches.least_bytes(samples)
        if found <= budget_bytes:
            per_sample = max((found - at_fitting) / (samples - fitting), 1.0)
            fitting, at_fitting = samples, found
        else:
            too_large = samples
    return fitting, per_sample


@dataclass(frozen=True, eq=False)
class _Batches:
    """Holds a step for any number of samples.

    Attributes:
        step: model and loss.
        call: a small one.
        traced: numbers of samples that were traced.
        family: the step with symbolic sizes.
        sizes: by the symbol's name, its value without samples and its growth with each sample.
    """

    step: Step
    call: StepCall
    traced: tuple[int, int]
    family: SizeFamily
    sizes: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, step: Step, make_call: MakeCall, traced: tuple[int, int], state: PlanningState) -> _Batches:
        """Captures a call of more samples than were planned symbolically."""
        cache, (few, more) = SignatureCache(), traced
        calls = make_call(few), make_call(more)
        cache.add(Signature(state), calls[0])
        if cache.derive(step, calls[1], state.budget_bytes) is None:
            raise InvalidArgument(NOT_SYMBOLIC.format(samples=few))
        family = cache.families[0]
        at_few, at_more = (family.symbolic.sizes(step, *call) or {} for call in calls)
        growth = {name: (at_more[name] - size) / (more - few) for name, size in at_few.items()}
        sizes = {name: (at_few[name] - few * each, each) for name, each in growth.items()}
        return cls(step, calls[0], traced, family, sizes)

    def least_bytes(self, samples: int) -> float:
        """Simulates the smallest peak of all known plans; infinity where a single operator takes too much memory."""
        try:
            prepared, known = self.family.plans_at(self.step, self.call, self._sizes_of(samples))
        except ProfileError:
            return float("inf")
        plans = (*known.plans, *known.fallback)
        peaks = [plan.point.peak_bytes for plan in plans]
        peaks += [simulated(known.problem, plan.point.actions).peak_bytes for plan in known.from_other_sizes]
        return min(peaks) + _input_bytes(prepared) - storage_bytes(self.call.tensors)

    def holds(self, call: StepCall) -> bool:
        """Tells whether the capture is valid for a call."""
        return self.family.sizes_of(self.step, call) is not None

    def _sizes_of(self, samples: int) -> Sizes:
        return {name: round(fixed + samples * growth) for name, (fixed, growth) in self.sizes.items()}


def _input_bytes(prepared: Prepared) -> int:
    """Counts the bytes of a step's inputs by its graph; equal storages count once."""
    joint: Any = prepared.joint
    pairs = zip(joint.placeholders, joint.inputs, strict=True)
    values = [node.meta["val"] for node, role in pairs if role.kind is InputKind.USER_INPUT]
    storages = (value.untyped_storage() for value in values if hasattr(value, "untyped_storage"))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
