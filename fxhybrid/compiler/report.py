"""Report: what was planned, checked, measured and left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fxhybrid.accuracy.calibration import ErrorPair
from fxhybrid.accuracy.drift_monitor import DriftCheck
from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.compiler.active_graphs import ActiveGraph
from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.compiler.signature import Signature
from fxhybrid.compiler.signature_bytes import held_bytes
from fxhybrid.compiler.tolerance import ToleranceValue, tolerance_value
from fxhybrid.console import as_html, as_text
from fxhybrid.ir.plan import Plan
from fxhybrid.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


MAX_COLUMNS = 3  # kinds of calls that have a column each; with more, each has a row of its own
SHORT = ("inputs", "budget", "predicted peak", "added time", "gradient error", "status")


@dataclass(frozen=True)
class SignatureReport:
    """Reports one kind of call.

    Attributes:
        inputs: shapes and types of the call's tensors, in words.
        plan: the plan for fresh gradients.
        save_all_bytes: simulated peak of the save-all step.
        minimum_bytes: smallest peak for which a plan is known.
        capture_check: how the captured graph compares with eager.
        accumulating: whether a plan fits while gradients of an earlier backward pass exist, in words.
        loss: whether the loss is planned too, and what counts where it is not, in words.
        backward: for which outputs gradients are planned, and which ones are to be dropped before, in words.
        tolerance_value: what a higher error tolerance would save; None if it was not asked for.
        error_pairs: gradient errors that were both predicted and measured: of groups of tensors and of plans.
    """

    inputs: str
    plan: Plan
    save_all_bytes: int
    minimum_bytes: int
    capture_check: str
    accumulating: str
    loss: str
    backward: str
    tolerance_value: ToleranceValue | None = None
    error_pairs: tuple[ErrorPair, ...] = ()


@dataclass(frozen=True)
class PartReport:
    """Reports one graph of a step that takes several.

    Attributes:
        line: of the user's code, behind which the graph ends.
        actions: how many tensors of it the plan treats how, in words.
        pending_bytes: alive before it begins.
        forward_bytes: highest point of its forward half.
        backward_bytes: the same of its backward half; 0 where it has none.
        held_bytes: what it hands on through Python, and no plan can compress while Python holds it.
    """

    line: str
    actions: str
    pending_bytes: int
    forward_bytes: int
    backward_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Report:
    """Reports all kinds of calls seen so far; prints as a table.

    Attributes:
        signatures: one entry per kind of call, the last called first.
        drift_checks: checks of the gradient error during training.
        held_bytes: Python memory of the signatures themselves, the model left out.
        share_of: of what a relative budget is a share, in words; empty where it is none.
        parts: the graphs of the last step in order, where it takes several.
        unplanned: why graphs of it run without a plan, in words.
    """

    signatures: tuple[SignatureReport, ...]
    drift_checks: tuple[DriftCheck, ...] = ()
    held_bytes: int = 0
    share_of: str = ""
    parts: tuple[PartReport, ...] = ()
    unplanned: tuple[str, ...] = ()

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())

    def __rich__(self) -> Table | Group:
        from rich.console import Group

        return Group(self._table(), self._parts_table()) if self.parts else self._table()

    def _parts_table(self) -> Table:
        from rich.table import Table

        table = Table(title="graphs of the step, with Python between them")
        for name in ("graph", "ends behind", "actions", "pending before", "forward peak", "backward peak", "hands on"):
            table.add_column(name)
        for number, part in enumerate(self.parts, 1):
            sizes = (part.pending_bytes, part.forward_bytes, part.backward_bytes, part.held_bytes)
            table.add_row(str(number), part.line, part.actions, *map(format_bytes, sizes))
        table.caption = "; ".join(f"not planned: {reason}" for reason in self.unplanned)
        return table

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(title="fxhybrid report")
        table.add_column("")
        rows = [_rows(report) for report in self.signatures]
        if not rows:
            table.add_row("nothing is planned yet: call the module once, or pass example_inputs to compile")
        elif len(rows) <= MAX_COLUMNS:
            for number in range(len(rows)):
                table.add_column(f"call {number + 1}")
            for name in rows[0]:
                table.add_row(name, *(row[name] for row in rows))
        else:
            for name in SHORT:
                table.add_column(name)
            for number, row in enumerate(rows):
                table.add_row(f"call {number + 1}", *(row[name] for name in SHORT))
        table.caption = "; ".join(self._notes())
        return table

    def _notes(self) -> Iterator[str]:
        if self.signatures:
            yield f"planned calls hold {format_bytes(self.held_bytes)} of Python memory"
        if self.share_of:
            yield self.share_of
        if self.drift_checks:
            replanned = sum(check.replanned for check in self.drift_checks)
            yield (
                f"gradient error checked {len(self.drift_checks)} times, re-planned {replanned} times; "
                f"last: {self.drift_checks[-1]}"
            )


def _rows(report: SignatureReport) -> dict[str, str]:
    plan = report.plan
    tolerance = report.tolerance_value
    counts = ", ".join(f"{count} {kind}" for kind, count in plan.counts().items()) or "everything saved"
    return {
        "inputs": report.inputs,
        "budget": format_bytes(plan.budget_bytes),
        "predicted peak": format_bytes(plan.peak_bytes),
        "save-all peak": format_bytes(report.save_all_bytes),
        "smallest known peak": format_bytes(report.minimum_bytes),
        "added time": f"{plan.added_s * 1e3:.1f} ms on {plan.step_s * 1e3:.1f} ms",
        "status": f"{plan.status} ({plan.solver}, gap {plan.gap:.1%})",
        "actions": counts,
        "exactness": str(plan.exactness),
        "gradient error": str(plan.gradient_error),
        "measured error over predicted": _pairs_text(report.error_pairs),
        "captured graph": report.capture_check,
        "accumulating": report.accumulating,
        "loss": report.loss,
        "backward pass": report.backward,
        **({} if tolerance is None else {f"{tolerance.more_error:g} more error": str(tolerance)}),
    }


def _pairs_text(pairs: Sequence[ErrorPair]) -> str:
    ratios = [pair.measured / pair.predicted for pair in pairs if pair.predicted > 0]
    return f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} comparisons" if ratios else "nothing measured"


def make_report(
    signatures: Sequence[Signature],
    more_error: float | None,
    drift_checks: Sequence[DriftCheck] = (),
    base: PlanningState | None = None,
) -> Report:
    """Makes the report of these signatures.

    Args:
        signatures: the last called first.
        more_error: says what a higher error tolerance would save, if given.
        drift_checks: made so far.
        base: the state that a relative budget is resolved by.
    """
    reports = tuple(_report(signature, more_error) for signature in signatures)
    share = base is not None and not isinstance(base.options.budget, int)
    share_of = f"the budget is relative to the save-all peak at {_inputs_text(base)}" if base and share else ""
    return Report(reports, tuple(drift_checks), held_bytes(signatures), share_of)


def _report(signature: Signature, more_error: float | None) -> SignatureReport:
    active, state = signature.active(), signature.state
    return SignatureReport(
        _inputs_text(state),
        active.plan,
        state.save_all_bytes,
        state.minimum_bytes,
        state.capture_check.note,
        _accumulating_note(state),
        _loss_note(active, state),
        _backward_note(state),
        tolerance_value(state, active.plan, more_error) if more_error else None,
        state.errors.pairs,
    )


def _inputs_text(state: PlanningState) -> str:
    joint = state.prepared.joint
    inputs = zip(joint.placeholders, joint.inputs, strict=True)
    values = [node.meta["val"] for node, role in inputs if role.kind is InputKind.USER_INPUT]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors) or "no tensors"


def _accumulating_note(state: PlanningState) -> str:
    """Says whether the budget holds while gradients of an earlier backward pass exist."""
    call = state.accumulating
    needed = state.plans_for(call).smallest.peak_bytes + state.extra_bytes(call)
    if needed <= state.budget_bytes:
        return "fits too while older gradients exist"
    return f"does not fit while older gradients exist: that takes {format_bytes(needed)}"


def _loss_note(active: ActiveGraph, state: PlanningState) -> str:
    """Says what the plan counts of the loss: all of it, or only the outputs and their gradients."""
    absent = state.prepared.expected.absent
    arriving = [value for k, value in enumerate(active.function.tangent_values) if k not in absent]
    if state.options.loss_fn is not None or all(value.numel() == 1 for value in arriving):
        return "planned with the model"
    problem = state.prepared.problem
    outputs = sum(problem.tensors[t].size_bytes for t in problem.outputs)
    return (
        f"computed outside: its bytes are outside the promise. Inside are outputs ({format_bytes(outputs)}) and their "
        f"gradients ({format_bytes(problem.tangent_bytes)}). Pass loss_fn to compile to plan the loss, too"
    )


def _backward_note(state: PlanningState) -> str:
    """Says for which outputs gradients are planned, and which outputs are to be dropped before."""
    prepared = state.prepared
    without, dropped = prepared.without_gradient, sorted(prepared.expected.dropped)
    if not prepared.traced.tangents or not (without or dropped):
        return "gradients arrive for all outputs, which are held until then"
    arriving = sorted(set(prepared.traced.tangents).difference(without))
    note = f"gradients arrive for outputs {_numbers(arriving)} of the call"
    note += f", not for {_numbers(without)}" if without else ""
    return note + (f"; outputs {_numbers(dropped)} are dropped before it begins" if dropped else "")


def _numbers(positions: Iterable[int]) -> str:
    return ", ".join(map(str, positions))
