"""Trial runs of a captured step: the captured graph against eager, and the gradient error of a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fxhybrid.accuracy.step_result import StepResult, observe_step, relative_difference
from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.errors import CaptureError
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.pipeline import Prepared
from fxhybrid.profiling.system_memory import available_bytes
from fxhybrid.runtime import StepFunction
from fxhybrid.units import format_bytes

SAME_GRAPH = 1e-3  # relative gradient difference above which a capture is not the user's model
LOW_PRECISION = 5e-2  # the same where bfloat16 or float16 is involved
STATE = "does the model depend on Python state that changes between calls?"
ASKS = (
    ". The model asks torch.compiler.is_compiling() and computes something else where it is: torch.compile would train "
    "that, too. Pass arguments with which both ways agree, or leave the question out of forward"
)
HEADROOM = 1.25  # of the save-all peak: two steps' gradients and copied buffers stay for comparison


@dataclass(frozen=True)
class CaptureCheck:
    """Says how the captured graph compares with eager.

    Attributes:
        difference: relative difference of all parameter gradients; None if it was not compared.
        note: the result in words, or why it was left out.
    """

    difference: float | None
    note: str


@dataclass(frozen=True, eq=False)
class Verifier:
    """Runs steps of one captured signature on one batch, and leaves the model as it was.

    Attributes:
        prepared: the captured signature.
        step: model and loss.
        call: the batch.
        with_inputs: whether gradients of the call's arguments count, too, as they do for a part of a longer step.
    """

    prepared: Prepared
    step: Step
    call: StepCall
    with_inputs: bool = False

    def run(self, graphs: SplitGraphs) -> StepResult:
        """Runs one step with these graphs, at the same seed every time.

        Raises:
            InvalidArgument: the loss is no scalar.
        """
        captured = self.prepared.capture
        function = captured.bind(
            StepFunction(
                graphs, self.prepared.traced.interface, captured.metadata, absent=self.prepared.expected.absent
            )
        )
        return self._observe(lambda: function(self.step, *self.call))

    def run_plain(self) -> StepResult:
        """Runs one step with the canonical graph as it is."""
        return self.run(self.prepared.plain_graphs())

    def run_eager(self) -> StepResult:
        """Runs the user's own step, at that seed."""
        return self._observe(lambda: self.step(*self.call))

    def _observe(self, run: Callable[[], Any]) -> StepResult:
        step = self.step
        return observe_step(
            lambda: step.check_result(run()),
            step.model,
            has_loss=step.loss_fn is not None,
            weighed=self.prepared.weighed,
            changed=self._changed(),
            inputs=self.call.tensors,
            inputs_count=self.with_inputs,
        )

    def _changed(self) -> list[Tensor]:
        """Returns what a step writes to in addition to the model's buffers."""
        roles, step = self.prepared.joint.inputs, self.step
        mutated = {role.name for role in roles if role.mutated and role.kind is not InputKind.USER_INPUT}
        changed: list[Tensor] = [p for name, p in step.named_parameters() if name in mutated]
        changed += [b for name, b in step.named_buffers() if name in mutated and not name.startswith("model.")]
        writes_input = any(role.mutated and role.kind is InputKind.USER_INPUT for role in roles)
        return [*changed, *(self.call.tensors if writes_input else [])]


@dataclass(frozen=True, eq=False)
class Reference:
    """Holds what the save-all step gives on one batch, with which other steps on it are compared.

    Attributes:
        verifier: runs steps on the batch.
        result: what the save-all step left behind.
    """

    verifier: Verifier
    result: StepResult

    def run(self, graphs: SplitGraphs) -> StepResult:
        """Runs one step with these graphs on the batch."""
        return self.verifier.run(graphs)

    def gradient_error(self, graphs: SplitGraphs) -> float:
        """Runs one step, and returns the relative error of all its parameter gradients."""
        return relative_difference(self.run(graphs).gradients, self.result.gradients)


def memory_shortage(save_all_bytes: int) -> str | None:
    """Says what a save-all step to compare with lacks; None where memory allows it."""
    needed, free = int(save_all_bytes * HEADROOM), available_bytes()
    if needed <= free:
        return None
    return f"a save-all step to compare with takes {format_bytes(needed)}, free are {format_bytes(free)}"


def reference(prepared: Prepared, step: Step, call: StepCall, *, with_inputs: bool = False) -> Reference:
    """Runs the save-all step on a batch."""
    verifier = Verifier(prepared, step, call, with_inputs)
    return Reference(verifier, verifier.run(prepared.save_all_graphs))


def check_capture(reference: Reference) -> CaptureCheck:
    """Runs the user's own step on the reference's batch, and compares the captured graph with it.

    Raises:
        CaptureError: the graph computes something else than the model.
    """
    verifier = reference.verifier
    return compare_with_eager(
        reference.result,
        verifier.run_plain,
        verifier.run_eager,
        another_order=verifier.prepared.another_order,
        is_low_precision=runs_in_low_precision(verifier.step),
    )


def compare_with_eager(
    found: StepResult,
    run_plain: Callable[[], StepResult],
    run_eager: Callable[[], StepResult],
    *,
    another_order: str,
    is_low_precision: bool,
) -> CaptureCheck:
    """Compares what a captured step leaves behind with the user's own step.

    Args:
        found: what the save-all step left behind.
        run_plain: runs the graph as it was captured, which is compared where the save-all step takes another order.
        run_eager: runs the user's own step.
        another_order: what takes sums in another order than eager's, in words; empty for nothing.
        is_low_precision: whether the step computes in bfloat16 or float16.

    Raises:
        CaptureError: the captured step computes something else than the model.
    """
    eager = run_eager()
    if not another_order:
        return _compared(found, eager, run_eager, is_low_precision=is_low_precision)
    check = _compared(run_plain(), eager, run_eager, is_low_precision=is_low_precision)
    difference = relative_difference(found.gradients, eager.gradients)
    note = f"{check.note}; with {another_order} gradients differ by {difference:.1e}"
    return check if check.difference is None else replace(check, note=note)


def _compared(
    found: StepResult, eager: StepResult, run_eager: Callable[[], StepResult], *, is_low_precision: bool
) -> CaptureCheck:
    note = "" if eager.finite else "; eager itself is not finite on this batch"
    if found.same_bits(eager):
        return CaptureCheck(0.0, f"bit-equal to eager: outputs, gradients, buffers and generator{note}")
    if note:
        return CaptureCheck(None, f"not compared{note}")
    difference = relative_difference(found.gradients, eager.gradients)
    own = relative_difference(run_eager().gradients, eager.gradients)
    if own > 0:
        return CaptureCheck(difference, f"eager does not repeat itself here (its own difference: {own:.1e})")
    same_rng = torch.equal(eager.rng_state, found.rng_state)
    limit = LOW_PRECISION if is_low_precision else SAME_GRAPH
    if not difference <= limit or not same_rng:
        raise CaptureError(
            f"the traced graph does not compute what the model does: gradients differ by {difference:.2g}"
            + ("" if same_rng else ", and random numbers are drawn in another order")
            + (ASKS if _is_way_when_compiled(found, run_eager, limit) else "; " + STATE)
        )
    return CaptureCheck(difference, f"gradients differ from eager by {difference:.1e}")


def _is_way_when_compiled(found: StepResult, run_eager: Callable[[], StepResult], limit: float) -> bool:
    """Says whether eager computes what a trace does where the model is told that it is compiled."""
    try:
        with told_that_it_is_compiled():
            told = run_eager()
    except Exception:  # noqa: BLE001  that way may be open to tracers only
        return False
    is_close = relative_difference(found.gradients, told.gradients) <= limit
    return is_close and torch.equal(told.rng_state, found.rng_state)


@contextlib.contextmanager
def told_that_it_is_compiled() -> Iterator[None]:
    """Lets eager models that ask whether they are compiled take the way that a trace of them takes."""
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        yield


def runs_in_low_precision(step: Step) -> bool:
    """Says whether a step computes in bfloat16 or float16."""
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in step.parameters())
    return low or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
