"""The re-planning loop: plans whose gradient error was measured, not only estimated.

Errors of single tensors are estimates, and they add up only roughly. So the plans to validate are run once on the
example batch; where one is above what plans aim at, all errors are scaled up and the step is re-planned. The target is
lower than the limit because other batches differ; a plan between the two is a fallback, taken where no other one fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fxhybrid.accuracy.calibration import ErrorPair, calibrate, measured_error
from fxhybrid.accuracy.verifier import Reference
from fxhybrid.ir.plan import Action, Actions
from fxhybrid.pipeline import Prepared
from fxhybrid.solvers.base import FrontierPoint
from fxhybrid.solvers.portfolio.known_plans import KnownPlans
from fxhybrid.units import format_bytes

MAX_ROUNDS = 5
RESCALE_MARGIN = 1.1  # errors are scaled up by this more than was measured, so that rounds do not creep
# Plans lie close below the target by their estimates. To search all anew, seconds on a large net, for a measured excess
# that is small beside what other batches differ by would leave compile times to chance.
NEAR_TARGET = 1.05
UNUSABLE_ERROR = 1e6  # an error that no limit allows

ActionsKey = frozenset[tuple[int, Action]]
Points = Sequence[FrontierPoint]


def _key(actions: Actions) -> ActionsKey:
    return frozenset(actions.items())


@dataclass(frozen=True)
class MeasuredErrors:
    """Holds the gradient errors that were measured on one batch.

    Attributes:
        pairs: errors that were both predicted and measured, of groups of tensors and of plans.
        by_actions: error of the actions that were run.
    """

    pairs: tuple[ErrorPair, ...] = ()
    by_actions: Mapping[ActionsKey, float] = field(default_factory=dict)

    def error_of(self, actions: Actions) -> float | None:
        """Returns the measured gradient error; None for actions that were not run."""
        return self.by_actions.get(_key(actions))

    def __or__(self, other: MeasuredErrors) -> MeasuredErrors:
        return MeasuredErrors(self.pairs + other.pairs, {**self.by_actions, **other.by_actions})


@dataclass(frozen=True)
class ReplanResult:
    """Holds plans, and what was measured on the way to them.

    Attributes:
        prepared: with the codecs and errors that were planned with.
        plans: what planning gave.
        errors: what was measured.
    """

    prepared: Prepared
    plans: KnownPlans
    errors: MeasuredErrors = MeasuredErrors()


def replan_within_error(
    prepared: Prepared,
    reference: Reference,
    max_grad_error: float,
    target_error: float,
    make_plans: Callable[[Prepared, Points, Points], KnownPlans],
    plans_to_validate: Callable[[KnownPlans], Points],
) -> ReplanResult:
    """Calibrates, and plans until all plans to validate are measured within the target error.

    Args:
        prepared: the step, with the codecs to begin with.
        reference: holds the batch.
        max_grad_error: limit of the measured relative error.
        target_error: what plans are made for, lower than the limit.
        make_plans: plans by the errors of what it is given, the accepted plans (at the target at most, or near it)
            and the near-feasible ones (only within the limit), which are to be fallbacks.
        plans_to_validate: the plans to run, those first that do not depend on the budget: what follows from them
            then does not either.

    Returns:
        The plans of the last round; after ``MAX_ROUNDS`` those without lossy codecs, and the accepted and
        near-feasible ones.
    """
    calibration = calibrate(prepared, reference)
    prepared, errors = prepared.with_choices(calibration.choices), calibration.errors
    measured = MeasuredErrors(calibration.pairs)
    accepted: list[FrontierPoint] = []
    near_feasible: list[FrontierPoint] = []
    for _ in range(MAX_ROUNDS):
        prepared = prepared.with_errors(errors)
        plans = make_plans(prepared, accepted, near_feasible)
        for point in plans_to_validate(plans):
            if measured.error_of(point.actions) is not None:
                continue
            measured |= validate_plan(prepared, reference, point)
            error = measured.error_of(point.actions) or 0.0
            if error <= NEAR_TARGET * target_error:
                accepted.append(point)
                continue
            if error <= max_grad_error:
                near_feasible.append(point)
            errors = {key: value * RESCALE_MARGIN * error / point.error for key, value in errors.items()}
            break
        else:
            return ReplanResult(prepared, plans, measured)
    prepared = prepared.with_errors(dict.fromkeys(errors, UNUSABLE_ERROR))
    return ReplanResult(prepared, make_plans(prepared, accepted, near_feasible), measured)


def validate_plan(prepared: Prepared, reference: Reference, point: FrontierPoint) -> MeasuredErrors:
    """Runs a plan on the reference's batch and notes its gradient error, unless it is exact."""
    if point.error == 0:
        return MeasuredErrors()
    found = measured_error(prepared, reference, point.actions)
    pair = ErrorPair(f"plan of {format_bytes(point.peak_bytes)}", "", point.error, found)
    return MeasuredErrors((pair,), {_key(point.actions): found})
