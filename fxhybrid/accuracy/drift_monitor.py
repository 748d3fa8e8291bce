"""The gradient error as training goes on: measured every so many steps, with a new plan where it is above the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fxhybrid.capture.step import Step, StepCall
from fxhybrid.errors import BudgetError, InvalidArgument
from fxhybrid.ir.plan import Plan


class Monitored(Protocol):
    """A planned kind of call whose gradient error can be measured, and which can be planned again."""

    @property
    def plan(self) -> Plan:
        """The plan for fresh gradients."""

    def measure_error(self, step: Step, call: StepCall) -> float:
        """Measures the plan's relative gradient error on a batch."""

    def recalibrate(self, step: Step, call: StepCall) -> None:
        """Plans again by the errors on a batch."""


@dataclass(frozen=True)
class DriftCheck:
    """One look at the gradient error.

    Attributes:
        step: training step before which it was measured, counted from 1.
        error: relative error of the plan's gradients on that step's batch; None if it was not measured.
        replanned: whether a new plan was made.
        note: what came of it.
    """

    step: int
    error: float | None
    replanned: bool
    note: str

    def __str__(self) -> str:
        found = "" if self.error is None else f"{self.error:.3g}, "
        return f"step {self.step}: {found}{self.note}"


class DriftGuard:
    """Counts training steps, and checks the plan before every ``every``-th.

    Attributes:
        checks: what was found, in order.
    """

    def __init__(self, every: int | None, max_grad_error: float) -> None:
        self.every = every
        self.max_grad_error = max_grad_error
        self.steps = 0
        self.checks: list[DriftCheck] = []

    def before(self, signature: Monitored, step: Step, call: StepCall) -> None:
        """Looks at the plan, if it is time to, on the batch that is about to be trained on."""
        self.steps += 1
        if self.every is not None and self.steps % self.every == 0:
            self.checks.append(self._check(signature, step, call.detached()))

    def _check(self, signature: Monitored, step: Step, call: StepCall) -> DriftCheck:
        if signature.plan.gradient_error.source == "exact":
            return DriftCheck(self.steps, 0.0, False, "the plan is exact")
        try:
            error = signature.measure_error(step, call)
        except InvalidArgument as refused:  # not enough memory: what a check takes is no reason to end a training
            return DriftCheck(self.steps, None, False, str(refused))
        if error <= self.max_grad_error:
            return DriftCheck(self.steps, error, False, "within the limit")
        try:
            signature.recalibrate(step, call)
        except BudgetError:
            return DriftCheck(self.steps, error, False, "above the limit, which no plan within the budget keeps")
        return DriftCheck(self.steps, error, True, "above the limit: planned anew")
