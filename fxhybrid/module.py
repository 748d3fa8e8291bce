"""``HybridModule``: the user's model, trained inside a budget."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxhybrid.accuracy.drift_monitor import DriftMonitor
from fxhybrid.capture.outer_context import refuse_export, refuse_sharded, refuse_transforms, refuse_wrapper
from fxhybrid.capture.step import Step, StepCall, check_call
from fxhybrid.compiler.active_graphs import ActiveGraph, ActiveGraphs
from fxhybrid.compiler.admission import call_state
from fxhybrid.compiler.call_state import FRESH, CallState
from fxhybrid.compiler.planning_state import adopt, expected_by, measure_error, plan_signature, recalibrate
from fxhybrid.compiler.report import Report, make_report
from fxhybrid.compiler.signature import Signature
from fxhybrid.devices.op_work import StepWork, work_of
from fxhybrid.errors import BudgetError, InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.problem import Problem
from fxhybrid.options import Options
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.units import Budget, check_budget

M = TypeVar("M", bound=nn.Module)
MANY_SIGNATURES = 32  # more than a real model has shapes; a Python counter makes one a step


class Session:
    """Holds what a HybridModule knows besides its model.

    Attributes:
        model: the user's.
        options: what the user asked for.
        transferred: a plan to begin with; None to make one.
        step: model and loss.
        budget_bytes: limit of the peak; None while a share is not resolved.
        monitor: checks of the gradient error.
        signatures: one for each kind of call, the last called first; each is a value that is replaced as a whole.
    """

    def __init__(self, model: nn.Module, options: Options, plan: Plan | None) -> None:
        self.model = model
        self.options = options
        self.transferred = plan
        self.step = Step(model, options.loss_fn, options.return_outputs)
        self.budget_bytes = options.budget if isinstance(options.budget, int) else None
        self.monitor = DriftMonitor(options.check_error_every, options.max_grad_error)
        self.signatures: list[Signature] = []

    @property
    def first(self) -> Signature:
        """The last called signature.

        Raises:
            InvalidArgument: nothing is planned yet.
        """
        if not self.signatures:
            raise InvalidArgument("nothing is planned yet: call the module once, or pass example_inputs to compile")
        return self.signatures[0]

    def find(self, call: StepCall) -> None:
        """Makes the signature that holds for ``call`` the first one; captures and plans if there is none yet."""
        for position, signature in enumerate(self.signatures):
            if signature.holds(self.step, call):
                if position:
                    self.signatures.insert(0, self.signatures.pop(position))
                return
        refuse_sharded(self.model)
        check_call(call, self.model)
        state = plan_signature(self.step, call.detached(), self.options, self.budget_bytes, self.transferred)
        self.signatures.insert(0, self._ready(Signature(state)))
        self.budget_bytes = state.budget_bytes
        if len(self.signatures) == MANY_SIGNATURES:
            warnings.warn(
                f"{MANY_SIGNATURES} kinds of calls are planned by now, each traced anew; does the model count in a "
                "Python attribute (make it a buffer), or do input shapes keep changing (pad them)?",
                stacklevel=4,
            )

    def active(self, call: CallState = FRESH) -> ActiveGraph:
        """Returns what the first signature runs in a state of the call."""
        self.signatures[0] = self.first.searched(call)  # what was found stays known, even if none fits
        return self.signatures[0].active(call)

    def run(self, call: StepCall) -> Any:
        """Runs one forward pass of a training step."""
        self.find(call)
        self.monitor.before_step(self, call)
        active = self._active_for(call)
        return self.step.check_result(active.call(self.step, *call))

    def _active_for(self, call: StepCall) -> ActiveGraph:
        """Returns what runs a call, for the backward pass that is expected to follow."""
        before, outlooks = self.first, self.first.outlooks()
        for expected in outlooks[:-1]:
            with contextlib.suppress(BudgetError):
                return self._active_expecting(expected, call)
        try:
            return self._active_expecting(outlooks[-1], call)
        except BudgetError:
            self.signatures[0] = self.first.expecting(before.state.prepared.expected, self.step)
            raise

    def _active_expecting(self, expected: ExpectedBackward, call: StepCall) -> ActiveGraph:
        self.signatures[0] = self.first.expecting(expected, self.step, call)
        return self.active(call_state(self.first.state, self.model, call.tensors))

    def _ready(self, signature: Signature) -> Signature:
        """Returns a signature with graphs for fresh gradients, or raises ``BudgetError`` if no plan fits."""
        outlooks = signature.outlooks()
        for expected in outlooks[:-1]:
            with contextlib.suppress(BudgetError):
                return signature.expecting(expected, self.step).ready()
        return signature.expecting(outlooks[-1], self.step).ready()

    def set_budget(self, budget: Budget) -> None:
        """Plans all signatures for another budget, or changes nothing and raises."""
        checked = check_budget(budget)
        if isinstance(checked, float):
            if not self.signatures:
                raise InvalidArgument("a share of the save-all peak needs a first call; pass bytes instead")
            checked = int(checked * self.signatures[-1].state.save_all_bytes)
        self.signatures = [signature.with_budget(checked, self.step) for signature in self.signatures]
        self.budget_bytes = checked

    def adopt(self, plan: Plan) -> None:
        """Carries out this very plan in the first signature."""
        expected = expected_by(self.first.state.prepared.traced, plan)
        found = self.first.expecting(expected, self.step)
        found = replace(found, state=adopt(found.state, plan), graphs=found.graphs.for_adopted(plan))
        self.signatures[0] = found.ready()

    def measure_error(self, call: StepCall) -> float:
        """Measures the gradient error of the first signature's plan on a batch."""
        graphs = self.active().function.graphs
        state, error = measure_error(self.first.state, self.step, call.detached(), graphs)
        self.signatures[0] = replace(self.first, state=state)
        return error

    def recalibrate(self, call: StepCall) -> None:
        """Re-plans the first signature by the errors on a batch, or changes nothing and raises."""
        state = recalibrate(self.first.state, self.step, call.detached())
        self.signatures[0] = replace(self.first, state=state, graphs=ActiveGraphs(), others={}).ready()


OPAQUE = (
    "a planned module runs its own graphs and cannot become part of a larger one. Drop fullgraph=True, so that the "
    'graph breaks around it; or compile the whole model by torch.compile(model, backend="fxhybrid", options=...)'
)


@torch.compiler.disable(reason=OPAQUE)  # type: ignore[no-untyped-call, untyped-decorator]
def _run_planned(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], loss_args: tuple[Any, ...]) -> Any:
    """Runs a call in training mode, by the plan if something needs a gradient."""
    call = StepCall(args, kwargs, loss_args)
    tensors = call.tensors
    if not any(t.requires_grad for t in (*session.model.parameters(), *tensors)):
        return session.step(*call)  # a frozen half of a model pair: there is no backward pass to plan
    refuse_transforms(tensors)
    return session.run(call.unmarked(tensors))


class _Forward:
    """Gives a class the model's forward by name and signature; an instance may set another one around it.

    Wrappers are set by trainers (``model.forward = autocast(model.forward)``). They stay apart from the model's own
    attributes: the planned graphs would run them a second time.
    """

    def __init__(self, model: nn.Module) -> None:
        original = type(model).forward

        def forward(self: HybridModule, *args: Any, **kwargs: Any) -> Any:
            refuse_export()
            return self._fxhybrid_call(*args, **kwargs)

        functools.update_wrapper(forward, original)
        del forward.__dict__["__wrapped__"]  # who unwraps must not arrive at the plain model
        forward.__dict__["__signature__"] = inspect.signature(original)
        self.function = forward

    def __get__(self, instance: HybridModule | None, owner: type | None = None) -> Callable[..., Any]:
        if instance is None:
            return self.function
        return instance._fxhybrid_outer or MethodType(self.function, instance)

    def __set__(self, instance: HybridModule, value: Callable[..., Any]) -> None:
        object.__setattr__(instance, "_fxhybrid_outer", value)

    def __delete__(self, instance: HybridModule) -> None:
        object.__setattr__(instance, "_fxhybrid_outer", None)


class HybridModule(nn.Module):
    """Wraps a model so that its training step peaks within a budget; use it as the model itself.

    It is the model: the same class (it subclasses the model's, by the same name), parameters, buffers, hooks,
    attributes and ``state_dict`` keys. Only calls in training mode with gradients enabled go through the planned
    graphs; all others run the model as it is. ``forward`` does the same as calling.
    """

    __slots__ = ("_fxhybrid_outer", "_fxhybrid_session")
    _fxhybrid_outer: Callable[..., Any] | None
    _fxhybrid_session: Session

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
            return _run_planned(session, args, kwargs, tuple(loss_args))
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
        return self._fxhybrid_session.active().plan

    @property
    def plans(self) -> list[Plan]:
        """One plan per signature, the last called first."""
        return [signature.active().plan for signature in self._fxhybrid_session.signatures]

    @property
    def planning_problem(self) -> Problem:
        """The step of the last called signature as plain numbers: what solvers see, and a case to report as JSON."""
        return self._fxhybrid_session.first.state.prepared.problem

    @property
    def compression_refusals(self) -> Mapping[str, str]:
        """Why the last called signature offers a tensor of the forward pass no codec, in words, by the tensor's name.

        What is not listed here is offered codecs: ``planning_problem.tensors`` shows which, and a plan takes one only
        where it is the cheapest way to the budget. Parameters, buffers and inputs exist through the whole step, so that
        nothing is stored of them.
        """
        return self._fxhybrid_session.first.state.prepared.compression_refusals

    @property
    def planning_work(self) -> StepWork:
        """What each op of ``planning_problem`` computes and moves: what planning for another device needs."""
        return work_of(self._fxhybrid_session.first.state.prepared.layout)

    @property
    def joint_graph(self) -> fx.GraphModule:
        """The rewritten joint graph of the last called signature."""
        return self._fxhybrid_session.active().joint.module

    @property
    def forward_graph(self) -> fx.GraphModule:
        """The forward graph of the last called signature; call it boxed, with one list."""
        return self._fxhybrid_session.active().function.graphs.forward

    @property
    def backward_graph(self) -> fx.GraphModule:
        """The backward graph of the last called signature; call it boxed, with one list."""
        return self._fxhybrid_session.active().function.graphs.backward

    def report(self, *, more_error: float | None = None) -> Report:
        """Reports what was planned, checked, measured and left out, per signature.

        Args:
            more_error: also say what a ``max_grad_error`` higher by this would save; plans once more for that.
        """
        session = self._fxhybrid_session
        return make_report(session.signatures, more_error, session.monitor.checks)

    def set_budget(self, budget: Budget) -> None:
        """Moves to another budget, between steps, without capturing or profiling again.

        Raises:
            InvalidArgument: not a budget.
            BudgetError: no known plan fits; the old budget stays.
        """
        self._fxhybrid_session.set_budget(budget)

    def use_plan(self, plan: Plan) -> None:
        """Carries out this very plan from now on, between steps; for the last called signature.

        A plan that a server made for this device comes in this way. ``set_budget`` leaves it again.

        Raises:
            PlanMismatchError: it was made for another graph or version, or peaks above its own budget here.
        """
        self._fxhybrid_session.adopt(plan)

    def check_error(self, *args: Any, loss_args: tuple[Any, ...] = (), **kwargs: Any) -> float:
        """Measures the relative gradient error of the current plan on another batch.

        The model, its gradients and the random generator are left as they were.
        """
        session = self._fxhybrid_session
        call = StepCall(args, kwargs, tuple(loss_args))
        session.find(call)
        return session.measure_error(call)

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
        session.find(call)
        session.recalibrate(call)

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridModule:
        session = self._fxhybrid_session
        model = copy.deepcopy(session.model, memo)
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
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "forward": _Forward(model)}
    hybrid: HybridModule = object.__new__(type(original.__name__, (HybridModule, original), names))
    object.__setattr__(hybrid, "__dict__", model.__dict__)
    object.__setattr__(hybrid, "_fxhybrid_outer", None)
    object.__setattr__(hybrid, "_fxhybrid_session", Session(model, options, plan))
    return hybrid
