"""Plans that keep the gradient error, by measurement.

Errors of single tensors are estimates, and they add up only roughly. So plans that matter are run once on the example
batch; if one is off what plans aim at, all errors are scaled up and planning starts anew. The aim is lower than the
limit because other batches differ; a plan between the two is taken where no other one fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fxhybrid.accuracy.calibration import ErrorPair, calibrate, measured_error
from fxhybrid.accuracy.verifier import Verifier
from fxhybrid.ir.plan import Action, Actions
from fxhybrid.pipeline import Prepared
from fxhybrid.units import format_bytes

ROUNDS = 5
UNUSABLE = 1e6  # an error that no limit allows

Plans = TypeVar("Plans")
Known = TypeVar("Known", bound="Estimated")
ActionsKey = frozenset[tuple[int, Action]]


def _key(actions: Actions) -> ActionsKey:
    return frozenset(actions.items())


class Estimated(Protocol):
    """Actions with the figures that a solver gives them."""

    @property
    def actions(self) -> Actions:
        """What is done to each tensor."""

    @property
    def peak_bytes(self) -> int:
        """Peak of the step."""

    @property
    def error(self) -> float:
        """Root of the sum of the tensors' squared errors."""


@dataclass(frozen=True)
class WithinError(Generic[Plans]):
    """Plans, and what was measured on the way to them.

    Attributes:
        prepared: with the codecs and errors that were planned with.
        plans: what planning gave.
        pairs: gradient errors that were both predicted and measured.
        measured: gradient error of the actions that were run.
    """

    prepared: Prepared
    plans: Plans
    pairs: tuple[ErrorPair, ...] = ()
    measured: dict[ActionsKey, float] = field(default_factory=dict)

    def error_of(self, actions: Actions) -> float | None:
        """The measured gradient error; None for actions that were not run."""
        return self.measured.get(_key(actions))


def plans_within_error(
    prepared: Prepared,
    verifier: Verifier,
    max_grad_error: float,
    aim: float,
    make_plans: Callable[[Prepared, Sequence[Known], Sequence[Known]], Plans],
    that_matter: Callable[[Plans], Sequence[Known]],
) -> WithinError[Plans]:
    """Calibrates, and plans until all plans that matter keep the aim on the verifier's batch, or at least the limit.

    Args:
        prepared: the step, with the codecs to begin with.
        verifier: holds the batch; must have a reference.
        max_grad_error: limit of the measured relative error.
        aim: what plans are made for, lower than the limit.
        make_plans: plans by the errors of what it is given; plans that kept the aim before are to be among them, and
            those that kept only the limit where no other one fits.
        that_matter: the plans to run, those first that do not depend on the budget: what follows from them then does
            not either.
    """
    calibration = calibrate(prepared, verifier)
    prepared, errors = prepared.with_choices(calibration.choices), calibration.errors
    pairs, measured = calibration.pairs, dict[ActionsKey, float]()
    kept: list[Known] = []  # within the aim
    near: list[Known] = []  # only within the limit
    for _ in range(ROUNDS):
        prepared = prepared.with_errors(errors)
        plans = make_plans(prepared, kept, near)
        for plan in that_matter(plans):
            if _key(plan.actions) in measured:
                continue
            found = measured_plan(prepared, verifier, plans, plan)
            pairs += found.pairs
            measured |= found.measured
            error = measured.get(_key(plan.actions), 0.0)
            if error <= aim:
                kept.append(plan)
                continue
            if error <= max_grad_error:
                near.append(plan)
            errors = {key: value * 1.1 * error / plan.error for key, value in errors.items()}
            break
        else:
            return WithinError(prepared, plans, pairs, measured)
    prepared = prepared.with_errors(dict.fromkeys(errors, UNUSABLE))
    return WithinError(prepared, make_plans(prepared, kept, near), pairs, measured)


def measured_plan(prepared: Prepared, verifier: Verifier, plans: Plans, plan: Estimated) -> WithinError[Plans]:
    """Runs one of the plans, unless it is exact; the verifier must have a reference."""
    if plan.error == 0:
        return WithinError(prepared, plans)
    found = measured_error(prepared, verifier, plan.actions)
    pair = ErrorPair(f"plan of {format_bytes(plan.peak_bytes)}", "", plan.error, found)
    return WithinError(prepared, plans, (pair,), {_key(plan.actions): found})
