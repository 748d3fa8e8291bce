"""What is learnt of a signature when it is planned first, here or in an earlier process."""

from __future__ import annotations

from dataclasses import replace

from fxhybrid.accuracy.replan_loop import MeasuredErrors, ReplanResult, replan_within_error, validate_plan
from fxhybrid.accuracy.verifier import CaptureCheck, Reference, check_capture, memory_shortage, reference
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.compiler.plan_cache import PlanRecord, read_record, record_path, write_record
from fxhybrid.compiler.plan_transfer import bind_actions, simulate_transferred
from fxhybrid.compiler.planner import PlanMaker, error_target, plans_to_validate
from fxhybrid.console import stage
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.options import Options
from fxhybrid.pipeline import Prepared
from fxhybrid.solvers.portfolio.known_plans import KnownPlans, plans_of
from fxhybrid.solvers.portfolio.solvers import Portfolio


def learn(
    prepared: Prepared, step: Step, call: StepCall, options: Options, budget_bytes: int, transferred: Plan | None
) -> PlanRecord:
    """Finds plans for a budget: those of an earlier process where they are kept, else by measuring and searching.

    Args:
        prepared: before calibration; with a transferred plan's codecs offered.
        step: model and loss.
        call: example arguments.
        options: what the user asked for.
        budget_bytes: the budget.
        transferred: a plan to carry out if it fits here.

    Raises:
        CaptureError: the captured graph computes something else than the model.
    """
    path = None if transferred is not None else record_path(prepared, options)
    record = read_record(path, prepared, options)
    if record is not None and budget_bytes not in record.budgets:
        record = _extended(record, step, call, budget_bytes, options)
    if record is not None:
        return record
    with stage("calibrate and search"):
        result, check = _measured(prepared, step, call, options, budget_bytes, transferred)
    return PlanRecord(result, (budget_bytes,), check, path, is_new=True)


def keep(record: PlanRecord, plans: KnownPlans) -> None:
    """Keeps what ``learn`` returned, and the plans known by now, for the next process."""
    if record.is_new or plans is not record.result.plans:
        write_record(replace(record, result=replace(record.result, plans=plans)))


def _measured(
    prepared: Prepared, step: Step, call: StepCall, options: Options, budget_bytes: int, transferred: Plan | None
) -> tuple[ReplanResult, CaptureCheck]:
    """Compares the capture with eager, and plans by errors on the batch."""
    shortage = memory_shortage(simulate_actions(prepared.problem, {}).peak_bytes)
    compared = None if shortage else reference(prepared, step, call)
    check = check_capture(compared) if compared else CaptureCheck(None, f"not compared with eager: {shortage}")
    result = _transfer(transferred, prepared, compared, options, budget_bytes) if transferred is not None else None
    if result is None:
        result = plan_within_error(prepared, compared, options, budget_bytes)
    return result, check


def _extended(record: PlanRecord, step: Step, call: StepCall, budget_bytes: int, options: Options) -> PlanRecord | None:
    """Searches plans for another budget; None where the one for it measures above the limit of the error."""
    result = record.result
    plans, _ = Portfolio(options.solver).extend(result.plans, budget_bytes)
    chosen, measured = plans.cheapest(budget_bytes), result.errors
    is_lossy = chosen is not None and chosen.point.error > 0 and measured.error_of(chosen.point.actions) is None
    if chosen is not None and is_lossy and not memory_shortage(simulate_actions(plans.problem, {}).peak_bytes):
        measured |= validate_plan(result.prepared, reference(result.prepared, step, call), chosen.point)
        if (measured.error_of(chosen.point.actions) or 0.0) > options.max_grad_error:
            return None
    budgets = (*record.budgets, budget_bytes)
    return replace(record, result=replace(result, plans=plans, errors=measured), budgets=budgets, is_new=True)


def plan_within_error(
    prepared: Prepared, compared: Reference | None, options: Options, budget_bytes: int
) -> ReplanResult:
    """Plans by the errors on the reference's batch; by estimates where there was no memory for one."""
    make_plans = PlanMaker(options, budget_bytes)
    if compared is None:
        return ReplanResult(prepared, make_plans(prepared.problem))
    return replan_within_error(
        prepared,
        compared,
        options.max_grad_error,
        error_target(options),
        lambda prepared, accepted, near_feasible: make_plans(prepared.problem, accepted, near_feasible),
        lambda plans: plans_to_validate(plans, budget_bytes),
    )


def _transfer(
    plan: Plan, prepared: Prepared, compared: Reference | None, options: Options, budget_bytes: int
) -> ReplanResult | None:
    """Takes a plan over as the only one known; None if it peaks above the budget on this device."""
    actions = bind_actions(plan, prepared.problem, prepared.fingerprint)
    known = simulate_transferred(prepared.problem, plan, actions)
    if known.point.peak_bytes > budget_bytes:
        return None
    empty = plans_of(prepared.problem, max_error=error_target(options))
    plans = replace(empty, plans=(known,), fixed=True)
    measured = MeasuredErrors() if compared is None else validate_plan(prepared, compared, known.point)
    return ReplanResult(prepared, plans, measured)
