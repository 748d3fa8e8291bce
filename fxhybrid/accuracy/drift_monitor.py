"""Drift of the gradient error during training: measured every so many steps, re-planned where above the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fxhybrid.capture.step import StepCall
from fxhybrid.errors import BudgetError, InvalidArgument
from fxhybrid.ir.plan import Plan


class Active(Protocol):
    """Is a plan at work."""

    @property
    def plan(self) -> Plan:
        """What is carried out."""


class Monitored(Protocol):
    """Can measure the gradient error of its plan, and re-plan."""

    def active(self) -> Active:
        """Returns the plan for fresh gradients."""

    def measure_error(self, call: StepCall) -> float:
        """Measures the plan's relative gradient error on a batch."""

    def recalibrate(self, call: StepCall) -> None:
        """Re-plans by the errors on a batch."""


@dataclass(frozen=True)
class DriftCheck:
    """Says what one measurement of the gradient error found.

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


class DriftMonitor:
    """Counts training steps, and checks the plan before every ``every``-th.

    Attributes:
        checks: what was found, in order.
    """

    def __init__(self, every: int | None, max_grad_error: float) -> None:
        self.every = every
        self.max_grad_error = max_grad_error
        self.steps = 0
        self.checks: list[DriftCheck] = []

    def before_step(self, planned: Monitored, call: StepCall) -> None:
        """Checks the plan, if it is time to, on the batch that is about to be trained on."""
        self.steps += 1
        if self.every is not None and self.steps % self.every == 0:
            self.checks.append(self._check(planned, call))

    def _check(self, planned: Monitored, call: StepCall) -> DriftCheck:
        if planned.active().plan.gradient_error.source == "exact":
            return DriftCheck(self.steps, 0.0, False, "the plan is exact")
        try:
            error = planned.measure_error(call)
        except InvalidArgument as refused:  # not enough memory: what a check takes is no reason to end a training
            return DriftCheck(self.steps, None, False, str(refused))
        if error <= self.max_grad_error:
            return DriftCheck(self.steps, error, False, "within the limit")
        try:
            planned.recalibrate(call)
        except BudgetError:
            return DriftCheck(self.steps, error, False, "above the limit, which no plan within the budget keeps")
        return DriftCheck(self.steps, error, True, "above the limit: re-planned")
