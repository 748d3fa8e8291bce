"""Verify: the captured graph against eager, and the gradient error of a plan, both by running them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxhybrid.accuracy.step_result import StepResult, observe_step, relative_difference
from fxhybrid.capture.capture import Capture
from fxhybrid.capture.joint_graph import InputKind, JointGraph
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.errors import CaptureError
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.profiling.system_memory import available_bytes
from fxhybrid.runtime import StepFunction
from fxhybrid.units import format_bytes

SAME_GRAPH = 1e-3  # relative gradient difference above which a capture is not the user's model
LOW_PRECISION = 5e-2  # the same where bfloat16 or float16 is involved
HEADROOM = 1.25  # of the save-all peak: two steps' gradients and copied buffers stay for comparison


@dataclass(frozen=True)
class CaptureCheck:
    """How the captured graph compares with eager.

    Attributes:
        difference: relative difference of all parameter gradients; None if it was not compared.
        note: the result in words, or why it was left out.
    """

    difference: float | None
    note: str


def _changed_tensors(joint: JointGraph, step: Step, call: StepCall) -> list[Tensor]:
    """What a trial run writes to besides the model's buffers."""
    mutated = {role.name for role in joint.inputs if role.mutated and role.kind is not InputKind.USER_INPUT}
    changed: list[Tensor] = [p for name, p in step.named_parameters() if name in mutated]
    changed += [b for name, b in step.named_buffers() if name in mutated and not name.startswith("model.")]
    inputs = any(role.mutated and role.kind is InputKind.USER_INPUT for role in joint.inputs)
    return [*changed, *(call.tensors if inputs else [])]


class Verifier:
    """Runs steps of one captured signature on its example arguments, leaving the model as it was.

    Attributes:
        check: the comparison of the captured graph with eager.
        reference: what a step that keeps everything gives; None where memory did not allow it.
    """

    def __init__(
        self,
        captured: Capture,
        joint: JointGraph,
        step: Step,
        call: StepCall,
        *,
        save_all: Callable[[], SplitGraphs],
        save_all_bytes: int,
        against_eager: bool = True,
    ) -> None:
        """Runs the reference if memory allows, and compares the captured graph with eager unless that was done before.

        Raises:
            CaptureError: the graph computes something else than the model.
        """
        self.captured, self.joint = captured, joint
        self.step, self.call = step, call
        self.has_loss = step.loss_fn is not None
        self.changed = _changed_tensors(joint, step, call)
        self.reference: StepResult | None = None
        needed, free = int(save_all_bytes * HEADROOM), available_bytes()
        if needed > free:
            self.check = CaptureCheck(
                None, f"not compared with eager: that takes {format_bytes(needed)}, free are {format_bytes(free)}"
            )
            return
        eager = self._eager() if against_eager else None
        self.reference = self.run(save_all())
        self.check = self._compare(eager, self.reference) if eager else CaptureCheck(None, "compared before")

    def run(self, graphs: SplitGraphs) -> StepResult:
        """One step with these graphs, at the reference's seed."""
        function = self.captured.bind(StepFunction(graphs, self.joint, self.captured.metadata))
        return observe_step(
            lambda: function(self.step, *self.call), self.step.model, has_loss=self.has_loss, changed=self.changed
        )

    def gradient_error(self, graphs: SplitGraphs) -> float:
        """Relative error of all parameter gradients against the step that keeps everything."""
        assert self.reference is not None, "callers check first whether there is a reference"
        return relative_difference(self.run(graphs).gradients, self.reference.gradients)

    def _eager(self) -> StepResult:
        step = self.step
        return observe_step(
            lambda: step.check_result(step(*self.call)), step.model, has_loss=self.has_loss, changed=self.changed
        )

    def _compare(self, eager: StepResult, found: StepResult) -> CaptureCheck:
        if found.same_bits(eager):
            return CaptureCheck(0.0, "bit-equal to eager: outputs, gradients, buffers and generator")
        difference = relative_difference(found.gradients, eager.gradients)
        same_rng = torch.equal(eager.rng_state, found.rng_state)
        own = relative_difference(self._eager().gradients, eager.gradients)
        if own > 0:
            return CaptureCheck(difference, f"eager does not repeat itself here (its own difference: {own:.1e})")
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.step.parameters())
        low = low or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if not difference <= (LOW_PRECISION if low else SAME_GRAPH) or not same_rng:
            raise CaptureError(
                f"the traced graph does not compute what the model does: gradients differ by {difference:.2g}"
                + ("" if same_rng else ", and random numbers are drawn in another order")
                + "; does the model depend on Python state that changes between calls?"
            )
        return CaptureCheck(difference, f"gradients differ from eager by {difference:.1e}")
