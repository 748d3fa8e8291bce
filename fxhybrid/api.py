"""The entry points: ``compile`` and ``plan``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.capture.step import Loss, Step, StepCall
from fxhybrid.compiler.largest_batch import largest_samples
from fxhybrid.compiler.planner import error_target
from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.devices.op_work import work_of
from fxhybrid.devices.remote_plan import plan_for_device
from fxhybrid.errors import InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.module import HybridModule, one_graph, segments_for, wrap
from fxhybrid.options import OPTIONS, Options
from fxhybrid.solvers.base import Solver
from fxhybrid.units import Budget, NamedBudget

Inputs = tuple[Any, ...] | dict[str, Any]
EVALUATING = "the model is in evaluation mode, which is not planned; call model.train() first"


def compile(
    model: nn.Module,
    *,
    budget: Budget,
    example_inputs: Inputs | None = None,
    loss_fn: Loss | None = None,
    loss_args: tuple[Any, ...] = (),
    return_outputs: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: bool = False,
    step_in_backward: bool = False,
    reserve_bytes: int = 0,
    solver: str | Solver = "auto",
    compression: str = "auto",
    exact: str | None = None,
    max_grad_error: float = 0.1,
    backend: str = "eager",
    check_error_every: int | None = None,
    dynamic: Mapping[str, Mapping[int, int]] | None = None,
    plan: Plan | None = None,
) -> HybridModule:
    """Wraps the model so that its training step peaks at or under ``budget`` at the least added time.

    It holds from the call to the end of the backward pass, for all pending calls together; see ``report()``.

    Args:
        model: any ``nn.Module`` that can be traced, in one graph or several; it is shared, not copied.
        budget: live tensor bytes over the whole step: an int, ``"512MiB"``, a share of the simulated save-all peak
            (0.6 or ``"60%"``), ``"auto"`` for what is free now, or ``"smallest"`` for the least that a plan takes.
        example_inputs: tuple or dict to plan with now; ``None`` plans at the first call.
        loss_fn: ``loss_fn(output, *loss_args)`` gives a scalar, planned with the model; calls then take ``loss_args=``.
        loss_args: example arguments of ``loss_fn``.
        return_outputs: return ``(loss, outputs)``.
        optimizer: its state counts, and its step, to the end of which the budget holds then.
        accumulate: gradients are added up over several calls: the budget must hold for that, too, from the start.
        step_in_backward: the backward pass updates each parameter by ``optimizer`` and drops its gradient.
        reserve_bytes: kept free for whatever else the process holds.
        solver: ``"auto"``, ``"mps"``, ``"ilp"`` or an object with a ``solve`` method.
        compression: ``"auto"``, ``"lossless"`` or ``"off"``; the last two give bit-exact gradients.
        exact: ``"reordered"`` for gradients equal but for rounding: no lossy codecs, any order of sums and layout.
        max_grad_error: limit of the relative error of all parameter gradients together.
        backend: ``"eager"`` runs the rewritten graphs as they are.
        check_error_every: training steps between checks of the gradient error, by save-all steps; None for none.
        dynamic: largest sizes of dimensions, as ``{"input_ids": {1: 512}}``; the largest call is planned first.
        plan: a plan made before, here or on another device, to carry out.

    Raises:
        InvalidArgument: a parameter cannot be used.
        CaptureError: the model cannot be traced.
        BudgetError: no known plan fits the budget.
        PlanMismatchError: ``plan`` belongs to another graph or version.
    """
    given = locals()
    options = Options.checked(**{name: given[name] for name in OPTIONS})  # each is an argument
    return _wrap(model, options, plan, example_inputs, loss_args)


def plan(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: Budget,
    loss_args: tuple[Any, ...] = (),
    device_profile: DeviceProfile | None = None,
    **options: Any,
) -> Plan:
    """Plans as ``compile`` does with the same arguments, without wrapping the model.

    With a ``device_profile`` it is a remote plan, for that device, which carries it out by
    ``compile(..., plan=plan)``. The heuristic plans it; bytes are those of this machine's operators.

    Raises:
        As ``compile`` does.
    """
    hybrid = wrap(model, Options.checked(budget=budget, **options), None)
    plan_now(hybrid, example_inputs, loss_args)
    here = hybrid.plan
    if device_profile is None:
        return here
    state = one_graph(hybrid).state
    problem, limit, work = state.prepared.problem, error_target(state.options), work_of(state.prepared.layout)
    return plan_for_device(problem, work, here, device_profile, state.budget_bytes, max_error=limit)


def largest_batch(make_batch: Callable[[int], Any], model: nn.Module, budget: Budget, **options: Any) -> int:
    """Finds the largest number of samples for which a plan keeps the budget, without running a step of that size.

    The step is captured and planned for a few samples, and captured once more with symbolic sizes; from that, larger
    batches are predicted and simulated.

    Args:
        make_batch: ``make_batch(n)`` returns the model's arguments for n samples, a tuple or a dict; with a ``loss_fn``
            a pair of those and the tuple of ``loss_args``. It is called for 4 and 6 samples, and for the result.
        model: as for ``compile``.
        budget: in bytes, text such as ``"2GiB"``, or ``"auto"``.
        options: further ones of ``compile``: ``loss_fn``, ``optimizer``, ``compression`` and so on.

    Raises:
        InvalidArgument: the budget is relative to a step, or the step depends on the number of samples.
        BudgetError: not even one sample fits.
    """
    checked = Options.checked(budget=budget, **options)
    if isinstance(checked.budget, float) or checked.budget is NamedBudget.SMALLEST:
        raise InvalidArgument(f'budget is {budget!r}, which depends on the batch; pass bytes or "auto"')
    if not model.training:
        raise InvalidArgument(EVALUATING)

    def make_call(samples: int) -> StepCall:
        made = make_batch(samples)
        inputs, loss_args = made if checked.loss_fn is not None else (made, ())
        return _step_call(inputs, loss_args)

    step = Step(model, checked.loss_fn, checked.return_outputs)
    with PLANNING, torch.enable_grad():
        return largest_samples(step, make_call, checked)


def _wrap(
    model: nn.Module, options: Options, plan: Any, example_inputs: Inputs | None, loss_args: tuple[Any, ...]
) -> HybridModule:
    if plan is not None and not isinstance(plan, Plan):
        raise InvalidArgument(f"plan is a {type(plan).__name__}; load one with fxhybrid.Plan.load(path)")
    hybrid = wrap(model, options, plan)
    if example_inputs is not None:
        plan_now(hybrid, example_inputs, loss_args)
    return hybrid


def plan_now(hybrid: HybridModule, example_inputs: Inputs, loss_args: tuple[Any, ...]) -> None:
    """Plans with example arguments, as a first call would.

    Raises:
        InvalidArgument: the arguments are neither a tuple nor a dict, or the model is in evaluation mode.
    """
    call = _step_call(example_inputs, loss_args)
    session = hybrid._fxhybrid_session
    if not session.model.training:
        raise InvalidArgument(EVALUATING)
    with PLANNING, torch.enable_grad():
        segments = segments_for(hybrid, call)
        if segments is not None:
            segments.find(call)


def _step_call(inputs: Inputs, loss_args: tuple[Any, ...]) -> StepCall:
    if isinstance(inputs, dict):
        return StepCall((), inputs, tuple(loss_args))
    if isinstance(inputs, (tuple, list)):
        return StepCall(tuple(inputs), {}, tuple(loss_args))
    kind = type(inputs).__name__
    raise InvalidArgument(f"example_inputs is a {kind}; pass a tuple of positional or a dict of keyword arguments")
