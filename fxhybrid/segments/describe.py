"""Describes a planned step of several graphs: as one plan, and graph by graph in the report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

from fxhybrid.compiler.plan_transfer import named_actions, versions
from fxhybrid.compiler.report import PartReport, Report, SignatureReport
from fxhybrid.ir.plan import GradientError, Plan, Tier
from fxhybrid.segments.path import Path
from fxhybrid.segments.sequence_plans import SequencePlan
from fxhybrid.units import format_bytes

ENDS_ITSELF = "the end of a function that Python calls"


def plan_of(path: Path, found: SequencePlan, budget_bytes: int, extra_bytes: int = 0) -> Plan:
    """Returns the plan that a user sees: tensors are named after the graph that they are in."""
    known, problem = found.known, path.plans.joined.problem
    source = "exact" if found.error == 0 else "estimated" if found.measured_error is None else "measured"
    prints = "".join(prepared.fingerprint for prepared in path.trial.prepared)
    return Plan(
        budget_bytes=budget_bytes,
        peak_bytes=found.peak.peak_bytes + extra_bytes,
        added_s=found.peak.overhead_s,
        lower_bound_s=min(known.lower_bound_s, found.peak.overhead_s),
        step_s=math.fsum(part.problem.step_s for part in path.trial.sequence.parts),
        gradient_error=GradientError(found.error, source),
        status=known.status.value,
        solver=known.solver,
        solve_s=known.solve_s,
        actions=named_actions(problem, known.point.actions),
        graph_fingerprint=hashlib.sha256(prints.encode()).hexdigest()[:32],
        versions=versions(),
        device=path.trial.prepared[0].profile.device,
        exactness=_tier(path, found),
    )


def _tier(path: Path, found: SequencePlan) -> Tier:
    if found.known.point.error > 0:
        return Tier.LOSSY
    reordered = any(prepared.reordered for prepared in path.trial.prepared)
    return Tier.REORDERED if reordered else Tier.LOSSLESS


def report_of(path: Path, found: SequencePlan, budget_bytes: int, more_bytes: int, unplanned: Iterable[str]) -> Report:
    """Reports the last path.

    Args:
        path: through the model.
        found: its plan.
        budget_bytes: limit of the peak.
        more_bytes: older gradients, where they exist.
        unplanned: why graphs run without a plan, in words.
    """
    needed = path.plans.smallest_known.needed_bytes + more_bytes
    fits = "fits too" if needed <= budget_bytes else f"does not fit ({format_bytes(needed)})"
    signature = SignatureReport(
        inputs=path.inputs,
        plan=plan_of(path, found, budget_bytes),
        save_all_bytes=path.plans.save_all.peak.peak_bytes,
        minimum_bytes=path.plans.smallest_known.needed_bytes,
        capture_check=path.check.note,
        accumulating=f"{fits} while older gradients exist",
        loss="planned with the model"
        if path.has_loss
        else "what Python computes of the outputs is outside the promise",
        backward=f"{len(path.trial.sequence.backward)} of {len(path.segments)} graphs have one",
    )
    return Report((signature,), parts=tuple(_parts(path, found)), unplanned=tuple(dict.fromkeys(unplanned)))


def _parts(path: Path, found: SequencePlan) -> Iterator[PartReport]:
    for k, (segment, actions) in enumerate(zip(path.segments, found.actions, strict=True)):
        counts: dict[str, int] = {}
        for action in actions.values():
            kind = str(action).partition(":")[0].rstrip("()")
            counts[kind] = counts.get(kind, 0) + 1
        yield PartReport(
            line=segment.line or ENDS_ITSELF,
            actions=", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "everything saved",
            pending_bytes=found.peak.before_bytes[k],
            forward_bytes=found.peak.forward_bytes[k],
            backward_bytes=found.peak.backward_bytes[k],
            held_bytes=path.boundary_bytes(k),
        )
