"""``HybridModule``: the user's model, trained inside a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxhybrid.capture.outer_context import refuse_transforms, refuse_wrapper
from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.capture.python_state import copied
from fxhybrid.capture.step import StepCall
from fxhybrid.compiler.explained import explanation_of, memory_figure_of, write_report
from fxhybrid.compiler.model_parameters import needs_gradients
from fxhybrid.compiler.outer_forward import OuterForward
from fxhybrid.compiler.report import Report, make_report
from fxhybrid.compiler.session import Session
from fxhybrid.compiler.signature import Signature
from fxhybrid.devices.op_work import StepWork, work_of
from fxhybrid.errors import GraphBreakError, InvalidArgument, let_go_of_frames
from fxhybrid.explain.explanation import Explanation
from fxhybrid.explain.plot import save
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.problem import Problem
from fxhybrid.options import Options
from fxhybrid.segments.segmented_step import SegmentedStep
from fxhybrid.units import Budget

OPAQUE = (
    "a planned module runs its own graphs and cannot become part of a larger one. Drop fullgraph=True, so that the "
    'graph breaks around it; or compile the whole model by torch.compile(model, backend="fxhybrid", options=...)'
)
SEVERAL = (
    "the step takes several graphs with Python between them, and this describes one graph: plan, report(), "
    "planning_problem and set_budget work; a model without such Python, planned as one graph, has the rest"
)


@torch.compiler.disable(reason=OPAQUE)  # type: ignore[no-untyped-call, untyped-decorator]
def _run_planned(
    hybrid: HybridModule, args: tuple[Any, ...], kwargs: dict[str, Any], loss_args: tuple[Any, ...]
) -> Any:
    """Runs a call in training mode, by the plan if something needs a gradient."""
    session, call = hybrid._fxhybrid_session, StepCall(args, kwargs, loss_args)
    tensors = call.tensors
    if not (needs_gradients(session.model) or any(t.requires_grad for t in tensors)):
        return session.step(*call)  # a frozen half of a model pair: there is no backward pass to plan
    refuse_transforms(tensors)
    call = call.unmarked(tensors)
    segments = segments_for(hybrid, call)
    return session.run(call) if segments is None else segments.run(call)


def segments_for(hybrid: HybridModule, call: StepCall) -> SegmentedStep | None:
    """Returns what runs a call that traces into several graphs only; None for one graph, which is planned then."""
    session = hybrid._fxhybrid_session
    with PLANNING:
        segments = hybrid._fxhybrid_segments
        if segments is not None and segments.is_planned:
            return None if session.knows(call) else segments
        object.__setattr__(hybrid, "_fxhybrid_segments", None)  # what is left of a first call that failed
        try:
            session.find(call)
        except GraphBreakError as error:
            if session.transferred is not None:
                raise
            let_go_of_frames(error)
            reason = error
        else:
            return None
        segments = SegmentedStep(session.step, session.options, session.budget_bytes, reason)
        object.__setattr__(hybrid, "_fxhybrid_segments", segments)
        return segments


def one_graph(hybrid: HybridModule) -> Signature:
    """Returns the last called signature of a model that traces into one graph.

    Raises:
        InvalidArgument: nothing is planned yet, or the step takes several graphs.
    """
    session = hybrid._fxhybrid_session
    if hybrid._fxhybrid_segments is not None and not session.signatures:
        raise InvalidArgument(SEVERAL)
    return session.first


class HybridModule(nn.Module):
    """Wraps a model so that its training step peaks within a budget; use it as the model itself.

    It is the model: the same class (it subclasses the model's, by the same name), parameters, buffers, hooks,
    attributes and ``state_dict`` keys. Only calls in training mode with gradients enabled go through the planned
    graphs; all others run the model as it is. ``forward`` does the same as calling.
    """

    __slots__ = ("_fxhybrid_outer", "_fxhybrid_segments", "_fxhybrid_session")
    _fxhybrid_outer: Callable[..., Any] | None
    _fxhybrid_session: Session
    _fxhybrid_segments: SegmentedStep | None  # of calls that trace into several graphs only

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; with a ``loss_fn``, gives ``loss_fn(output, *loss_args)`` instead of the output.

        In evaluation mode or under ``no_grad``, ``loss_args`` may be left out to get the plain output.

        Args:
            args: the model's own arguments.
            kwargs: likewise; ``loss_args``, a tuple, goes to ``loss_fn``.

        Raises:
            InvalidArgument: an argument that cannot be passed, or is on another device.
            CaptureError: the call cannot be traced into one graph, or a transform runs around it.
            BudgetError: no known plan for this kind of call fits the budget.
        """
        return (self._fxhybrid_outer or self._fxhybrid_call)(*args, **kwargs)

    def _fxhybrid_call(self, *args: Any, loss_args: tuple[Any, ...] = (), **kwargs: Any) -> Any:
        session = self._fxhybrid_session
        options = session.options
        if loss_args and options.loss_fn is None:
            raise InvalidArgument("loss_args are given, but the model was compiled without loss_fn")
        if session.model.training and torch.is_grad_enabled():
            return _run_planned(self, args, kwargs, tuple(loss_args))
        if options.loss_fn is not None and loss_args:
            return session.step(args, kwargs, tuple(loss_args))
        return session.model(*args, **kwargs)

    def compile(self, *_: Any, **__: Any) -> None:
        """Refuses ``torch.nn.Module.compile``: a planned step runs its own graphs.

        Raises:
            InvalidArgument: always.
        """
        raise InvalidArgument(
            "module.compile() would replace the planned graphs; leave it out, or call it on the plain model before "
            "fxhybrid.compile"
        )

    @property
    def plan(self) -> Plan:
        """The plan of the last called signature, for fresh gradients."""
        if self._fxhybrid_segments is not None:
            return self._fxhybrid_segments.plan()
        return one_graph(self).active().plan

    @property
    def plans(self) -> list[Plan]:
        """One plan per signature, the last called first."""
        own = [] if self._fxhybrid_segments is None else [self._fxhybrid_segments.plan()]
        return own + [signature.active().plan for signature in self._fxhybrid_session.signatures]

    @property
    def planning_problem(self) -> Problem:
        """The step of the last called signature as plain numbers: what solvers see, and a case to report as JSON."""
        if self._fxhybrid_segments is not None:
            return self._fxhybrid_segments.path.plans.joined.problem
        return one_graph(self).state.prepared.problem

    @property
    def compression_refusals(self) -> Mapping[str, str]:
        """Why the last called signature offers a tensor of the forward pass no codec, in words, by the tensor's name.

        What is not listed here is offered codecs: ``planning_problem.tensors`` shows which, and a plan takes one only
        where it is the cheapest way to the budget. Parameters, buffers and inputs exist through the whole step, so that
        nothing is stored of them.
        """
        return one_graph(self).state.prepared.compression_refusals

    @property
    def planning_work(self) -> StepWork:
        """What each op of ``planning_problem`` computes and moves: what planning for another device needs."""
        return work_of(one_graph(self).state.prepared.layout)

    @property
    def joint_graph(self) -> fx.GraphModule:
        """The rewritten joint graph of the last called signature."""
        return one_graph(self).active().joint.module

    @property
    def forward_graph(self) -> fx.GraphModule:
        """The forward graph of the last called signature; call it boxed, with one list."""
        return one_graph(self).active().function.graphs.forward

    @property
    def backward_graph(self) -> fx.GraphModule:
        """The backward graph of the last called signature; call it boxed, with one list."""
        return one_graph(self).active().function.graphs.backward

    def report(self, *, more_error: float | None = None, html: str | Path | None = None) -> Report:
        """Reports what was planned, checked, measured and left out, per signature.

        Args:
            more_error: also say what a ``max_grad_error`` higher by this would save; plans once more for that.
            html: also write it to this file, with pictures, plan and settings of the last called signature.

        Raises:
            InvalidArgument: ``html`` is given and nothing is planned yet, or matplotlib is not installed.
        """
        session, segments = self._fxhybrid_session, self._fxhybrid_segments
        if segments is not None and html is None:
            return segments.report()
        report = make_report(session.signatures, more_error, session.monitor.checks, session.base)
        if html is not None:
            write_report(one_graph(self), report, html)
        return report

    def explain(self) -> Explanation:
        """Explains the plan of the last called signature by module path and source line of the model.

        Raises:
            InvalidArgument: nothing is planned yet.
        """
        return explanation_of(one_graph(self))

    def plot_memory(self, path: str | Path) -> None:
        """Draws memory over the unmodified and over the planned step, stacked by what it is spent on.

        Args:
            path: of the picture; its suffix says the format.

        Raises:
            InvalidArgument: nothing is planned yet, or matplotlib is not installed.
        """
        save(memory_figure_of(one_graph(self)), path)

    def set_budget(self, budget: Budget) -> None:
        """Moves to another budget, between steps, without capturing or profiling again.

        Raises:
            InvalidArgument: not a budget.
            BudgetError: no known plan fits; the old budget stays.
        """
        with PLANNING:
            if self._fxhybrid_segments is not None:
                self._fxhybrid_segments.set_budget(budget)
            if self._fxhybrid_segments is None or self._fxhybrid_session.signatures:
                self._fxhybrid_session.set_budget(budget)

    def use_plan(self, plan: Plan) -> None:
        """Carries out this very plan from now on, between steps; for the last called signature.

        A plan that a server made for this device comes in this way. ``set_budget`` leaves it again.

        Raises:
            PlanMismatchError: it was made for another graph or version, or peaks above its own budget here.
        """
        one_graph(self)
        with PLANNING:
            self._fxhybrid_session.adopt(plan)

    def check_error(self, *args: Any, loss_args: tuple[Any, ...] = (), **kwargs: Any) -> float:
        """Measures the relative gradient error of the current plan on another batch.

        The model, its gradients and the random generator are left as they were.
        """
        session = self._fxhybrid_session
        call = StepCall(args, kwargs, tuple(loss_args))
        with PLANNING:
            segments = segments_for(self, call)
            return session.measure_error(call) if segments is None else segments.measure_error(call)

    def recalibrate(self, *args: Any, loss_args: tuple[Any, ...] = (), **kwargs: Any) -> None:
        """Measures gradient errors on another batch, chooses channel widths by them and plans again, between steps.

        Neither captures nor profiles again. It runs save-all steps, so it takes more than the budget. The
        model, its gradients and the random generator are left as they were.

        Raises:
            InvalidArgument: memory does not allow a save-all step.
            BudgetError: no plan within the budget keeps the error any more; the old plan stays.
        """
        session = self._fxhybrid_session
        call = StepCall(args, kwargs, tuple(loss_args))
        with PLANNING:
            if segments_for(self, call) is not None:
                raise InvalidArgument(SEVERAL)
            session.recalibrate(call)

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridModule:
        session = self._fxhybrid_session
        model = copied(session.model, memo)
        return wrap(model, session.options, session.transferred)

    def __reduce__(self) -> Any:
        session = self._fxhybrid_session
        return (wrap, (session.model, session.options, session.transferred))


def wrap(model: nn.Module, options: Options, plan: Plan | None) -> HybridModule:
    """Wraps ``model`` in a HybridModule; both share all state.

    Raises:
        InvalidArgument: ``model`` is no module, or is one of ours already.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(model, HybridModule):
        raise InvalidArgument("the model is compiled already; call set_budget on it, or compile the plain model")
    for name, part in model.named_modules():
        if isinstance(part, HybridModule):
            raise InvalidArgument(
                f"the submodule {name!r} is compiled already; compile the whole model only, or it only"
            )
    refuse_wrapper(model)
    original = type(model)
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "forward": OuterForward(original.forward),
    }
    hybrid: HybridModule = object.__new__(type(original.__name__, (HybridModule, original), names))
    object.__setattr__(hybrid, "__dict__", model.__dict__)
    object.__setattr__(hybrid, "_fxhybrid_outer", None)
    object.__setattr__(hybrid, "_fxhybrid_segments", None)
    object.__setattr__(hybrid, "_fxhybrid_session", Session(model, options, plan))
    return hybrid
