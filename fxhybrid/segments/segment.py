"""One graph of a step that takes several: captured when Dynamo hands it over, prepared for the calls that are made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxhybrid.capture.capture import Capture, FlatFunction
from fxhybrid.capture.output_structure import output_structure
from fxhybrid.capture.segment_capture import capture_segment, needs_gradient
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.errors import CaptureError
from fxhybrid.ops.hand_on import HAND_ON
from fxhybrid.options import Options
from fxhybrid.passes.boundaries import can_be_handed_on, with_boundaries
from fxhybrid.passes.channels_last import USUAL_LAYOUT, Crossing
from fxhybrid.passes.channels_last_choice import groups_that_pay
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.passes.traced import Traced
from fxhybrid.pipeline import Prepared, canonical, prepare_traced
from fxhybrid.segments.images import images_of
from fxhybrid.segments.lifted_graph import LiftedGraph

NOTHING = "nothing in it needs a gradient"


@dataclass(frozen=True)
class Form:
    """Says how a segment is called.

    Attributes:
        boundaries: positions of the graph's inputs that earlier graphs of the step made.
        absent: positions of the tangents that do not arrive.
        crossing: images that come from other graphs in channels_last, or go to others so.
    """

    boundaries: frozenset[int]
    absent: frozenset[int] = frozenset()
    crossing: Crossing = USUAL_LAYOUT


class SegmentRun(Protocol):
    """Is a step under way."""

    def call(self, segment: Segment, arguments: Sequence[Any]) -> Any:
        """Runs a graph of the step."""


@dataclass(eq=False)
class Segment:
    """Holds one of Dynamo's graphs.

    Attributes:
        lifted: the graph as a module.
        capture: of the graph; None where it is not planned.
        refusal: why it is not planned, in words.
        line: where in the user's code the graph ends.
        images: strides of the inputs that may come in another layout than the graph was traced with, by position.
        options: what the user asked for.
        prepared: up to the planning problem, by the form of the call.
        calibrated: the same with measured errors.
        own_plans: of the segment by itself, by the form of the call.
        twins: the same graph with the parameters of other layers, which Dynamo runs by the same code.
        is_compared: whether the graph has been compared with eager.
    """

    lifted: LiftedGraph
    capture: Capture | None
    refusal: str
    line: str
    options: Options
    images: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    prepared: dict[Form, Prepared] = field(default_factory=dict)
    calibrated: dict[Form, Prepared] = field(default_factory=dict)
    own_plans: dict[Form, Any] = field(default_factory=dict)
    twins: list[Segment] = field(default_factory=list)
    _captured: Capture | None = None  # takes what owns the tensors with each call
    is_compared: bool = False
    _traced: dict[tuple[frozenset[int], Crossing], Traced] = field(default_factory=dict)

    @classmethod
    def of(
        cls, graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options, own: Collection[int]
    ) -> Segment:
        """Captures a graph while Dynamo hands it over; ``own`` are the identities of the model's tensors."""
        lifted = LiftedGraph(graph, example_inputs, own)
        line = _last_line(graph)
        if not needs_gradient(graph):
            return cls(lifted, None, NOTHING, line, options)
        step = Step(lifted, None, False)
        try:
            captured = capture_segment(
                step, graph, example_inputs, lambda owner, args, *_: owner.full(args), exact=not options.reordered
            )
        except CaptureError as error:
            return cls(lifted, None, str(error), line, options)
        images = images_of(captured, example_inputs) if options.reordered else {}
        return cls(lifted, _owned_by(lifted, captured), "", line, options, images, _captured=captured)

    @property
    def step(self) -> Step:
        """The graph as a step of its own."""
        return Step(self.lifted, None, False)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the graph, as the step says that is under way."""
        run = run_under_way()
        if run is None or not torch.is_grad_enabled():
            return self.plain(arguments)
        return run.call(self.twin_for(arguments), arguments)

    def twin_for(self, arguments: Sequence[Any]) -> Segment:
        """Returns the segment that owns the parameters and buffers among ``arguments``."""
        captured = self._captured
        known = next((each for each in (self, *self.twins) if each.lifted.owns(arguments)), None)
        if known is None and captured is not None:
            self.twins[:] = [twin for twin in self.twins if twin.lifted.is_shared]  # others' layers are gone
            lifted = self.lifted.twin(arguments)
            known = Segment(lifted, _owned_by(lifted, captured), "", self.line, self.options, self.images)
            self.twins.append(known)
        return known or self

    def plain(self, arguments: Sequence[Any]) -> Any:
        """Runs the graph as it is."""
        return self.lifted.graph(*self.as_traced(arguments))

    def as_traced(self, arguments: Sequence[Any]) -> list[Any]:
        """Returns the arguments with images in the layout that the graph was traced with."""
        given = list(arguments)
        for i, strides in self.images.items():
            if given[i].stride() != strides:
                given[i] = given[i].contiguous()
        return given

    def form_of(self, arguments: Sequence[Any]) -> Form:
        """Returns the form of a call: tensors with a history come from earlier in the step."""
        assert self.capture is not None
        joint = self.capture.joint
        made = (i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.grad_fn is not None)
        return Form(frozenset(i for i in made if can_be_handed_on(joint, i)))

    def call_of(self, arguments: Sequence[Any], crossing: Crossing = USUAL_LAYOUT) -> StepCall:
        """Returns the arguments of a call of the graph as a step of its own, cut off from what computed them."""
        given = self.as_traced(arguments)
        for i in crossing.inputs:
            given[i] = given[i].contiguous(memory_format=torch.channels_last)
        return StepCall(self.lifted.free_of(given), {}, ()).detached()

    def prepare(self, form: Form, call: StepCall) -> Prepared:
        """Returns the segment up to the planning problem; its outputs live to the end of its forward half."""
        known = self.prepared.get(form)
        if known is None:
            traced = self.trace(form, call)
            dropped = frozenset(range(traced.n_outputs))
            known = _with_boundaries_alive(prepare_traced(traced, ExpectedBackward(form.absent, dropped)))
            self.prepared[form] = known
        return known

    def trace(self, form: Form, call: StepCall) -> Traced:
        """Returns the segment in its canonical form."""
        key = form.boundaries, form.crossing
        if key not in self._traced:
            if form.crossing == USUAL_LAYOUT:
                self._traced[key] = self._trace(form.boundaries, call)
            else:
                usual = self.trace(Form(form.boundaries), call)
                self._traced[key] = usual.in_layout(usual.channels_last, form.crossing)
        return self._traced[key]

    def _trace(self, boundaries: frozenset[int], call: StepCall) -> Traced:
        assert self.capture is not None
        structure = output_structure(self.capture, self.step, call)
        captured = replace(self.capture, joint=with_boundaries(self.capture.joint, boundaries))
        # the optimizer steps after the backward halves of all segments
        options = replace(self.options, optimizer=None, step_in_backward=False)
        traced = canonical(captured, structure, self.step, call, options)
        return traced.in_layout(groups_that_pay(captured.joint, traced.plain)) if options.reordered else traced


def _owned_by(lifted: LiftedGraph, captured: Capture) -> Capture:
    """Returns a capture whose functions take their parameters and buffers from a module."""

    def bind(flat: FlatFunction) -> Callable[..., Any]:
        run = captured.bind(flat)
        return lambda _, *call: run(lifted, *call)

    return replace(captured, bind=bind)


class _UnderWay(threading.local):
    run: SegmentRun | None = None


_UNDER_WAY = _UnderWay()


def run_under_way() -> SegmentRun | None:
    """Returns the step that is under way in this thread."""
    return _UNDER_WAY.run


class under_way:
    """Lets a step run the graphs that are called within the block."""

    def __init__(self, run: SegmentRun) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.before = _UNDER_WAY.run
        _UNDER_WAY.run = self.run

    def __exit__(self, *_: object) -> None:
        _UNDER_WAY.run = self.before


def boundary_tensors(prepared: Prepared) -> dict[int, int]:
    """Maps the positions of inputs that are handed on to the tensors of the problem that stand for them."""
    joint, layout = prepared.joint, prepared.layout
    positions = {node: i for i, node in enumerate(joint.placeholders)}
    nodes = joint.module.graph.find_nodes(op="call_function", target=HAND_ON)
    return {positions[node.args[0]]: layout.storages_of[node][0] for node in nodes}


def _with_boundaries_alive(prepared: Prepared) -> Prepared:
    """Lets what is handed on live to the end of the forward half, in which the caller holds it."""
    problem = prepared.problem
    alive = tuple(dict.fromkeys((*problem.mutations, *boundary_tensors(prepared).values())))
    return replace(prepared, problem=replace(problem, mutations=alive))


def _last_line(graph: fx.GraphModule) -> str:
    reason: Any = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break or not reason.user_stack:
        return ""
    return f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}"
