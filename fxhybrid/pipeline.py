"""Prepare: the stages before solving, capture -> canonicalize -> profile -> problem, and those after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor, fx

from fxhybrid.capture.capture import Capture, capture
from fxhybrid.capture.joint_graph import InputKind, JointGraph, OutputKind
from fxhybrid.capture.output_structure import OutputStructure, output_structure
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.console import stage
from fxhybrid.ir.part import NO_HEADROOM, DyingTangent, Headroom
from fxhybrid.ir.plan import Actions, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule, lower
from fxhybrid.ops.recurrent import runs_in_segments
from fxhybrid.options import Options
from fxhybrid.passes.build_problem import CodecChoices, calls_of, problem_of, with_codec_options, with_update
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.channels_last_choice import groups_that_pay
from fxhybrid.passes.codec_choices import codec_choices, codec_refusals
from fxhybrid.passes.error_prior import DEFAULT_GROUP_ERROR, ErrorTable, error_table, lossy_groups
from fxhybrid.passes.expected_backward import ALL_ARRIVE, ExpectedBackward, held_and_dropped
from fxhybrid.passes.faster_forms import faster_calls, with_faster_forms
from fxhybrid.passes.gradient_takes import take_nodes, updating_parameters
from fxhybrid.passes.in_place import in_place
from fxhybrid.passes.loss_heads import has_sliced_products, multiply_by_slices
from fxhybrid.passes.prune_tangents import prune_tangents
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.passes.storages import Layout, layout_of
from fxhybrid.passes.traced import Traced
from fxhybrid.profiling.collector import paused_collector
from fxhybrid.profiling.op_profiler import Profile, profile_calls
from fxhybrid.profiling.optimizer_step import optimizer_bytes
from fxhybrid.profiling.parameter_update import ParameterUpdates, updates_of
from fxhybrid.profiling.state_bytes import storage_bytes


class GraphSharing(Protocol):
    """Shares the halves of plans between sizes of a call."""

    def graphs(self, schedule: Schedule, build: Callable[[], SplitGraphs]) -> SplitGraphs:
        """Returns the halves of a schedule; ``build`` makes those for one size alone."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Holds a captured signature up to the planning problem.

    ``joint`` is without the branches of the tangents that are not expected. ``refusals`` holds, by name, the rule by
    which a tensor was offered no codec from the start; ``sharing`` gives the halves of plans where other sizes have the
    same.
    """

    traced: Traced
    expected: ExpectedBackward
    joint: JointGraph
    layout: Layout
    profile: Profile
    choices: CodecChoices
    refusals: Mapping[str, str]
    problem: Problem
    sharing: GraphSharing | None = None

    @property
    def capture(self) -> Capture:
        """What was captured."""
        return self.traced.capture

    @property
    def fingerprint(self) -> str:
        """Hash of the whole graph, whatever backward pass is expected."""
        return self.traced.fingerprint

    @property
    def another_order(self) -> str:
        """What takes sums in another order than eager's, in words; empty where nothing does but recurrent layers."""
        laid_out = ["convolutions in channels_last"] if self.traced.channels_last else []
        return " and ".join([*laid_out, *(["a loss head in slices"] if has_sliced_products(self.joint) else [])])

    @property
    def reordered(self) -> bool:
        """Whether kernels take sums in another order than eager's."""
        return bool(self.another_order) or runs_in_segments(self.joint.module.graph)

    def plain_graphs(self) -> SplitGraphs:
        """Builds the halves of the canonical graph as it is: nothing recomputed or encoded, in eager's layouts."""
        plain, absent = self.traced.plain, self.expected.absent
        return split(prune_tangents(plain, absent) if absent else plain)

    @property
    def weighed(self) -> frozenset[int] | None:
        """Positions, among the tensors that a call returns, of those whose gradients are expected; None for all."""
        return self.traced.weighed(self.expected.absent)

    @property
    def without_gradient(self) -> tuple[int, ...]:
        """Positions of the outputs whose gradients are not expected to arrive."""
        absent = self.expected.absent
        return tuple(sorted(i for i, tangent in self.traced.tangents.items() if tangent in absent))

    def meta(self, storage: int) -> TensorMeta:
        """Returns shape, strides and type of a storage that some node reads whole."""
        base = self.layout.storages[storage].base
        assert base is not None, "codecs are offered only for storages that are read"
        return TensorMeta.of(base.meta["val"])

    @property
    def compression_refusals(self) -> Mapping[str, str]:
        """Why tensors of the forward pass are offered no codec, in words, by name."""
        dropped = (self.layout.storages[t].name for t, specs in self.choices.items() if not specs)
        return {**self.refusals, **dict.fromkeys(dropped, "calibration found no codec with a finite gradient error")}

    @cached_property
    def save_all_graphs(self) -> SplitGraphs:
        """The halves of the save-all step."""
        return build_graphs(self, {})

    def with_choices(self, choices: CodecChoices) -> Prepared:
        """Returns the same with other codecs offered, their times measured; ``with_errors`` makes a problem of it."""
        return dataclasses.replace(self, choices=choices, profile=_profile(self.layout, choices))

    def offering(self, actions: Actions) -> Prepared:
        """Returns the same with a transferred plan's channel-wise codecs offered too: widths differ from run to run."""
        choices, errors = dict(self.choices), dict[tuple[int, str], float]()
        for t, tensor in enumerate(self.problem.tensors):
            lossy = [option for option in tensor.codecs if not option.lossless]
            errors |= {(t, option.codec): option.error for option in lossy}
            action = actions.get(t)
            spec = action.codec if isinstance(action, Compress) and action.codec.startswith("channelwise:") else None
            if spec and lossy and spec not in choices[t] and get_codec(spec).supports(self.meta(t)):
                choices[t] = (*choices[t], spec)
                errors[t, spec] = max(o.error / get_codec(o.codec).noise for o in lossy) * get_codec(spec).noise
        return self if choices == self.choices else self.with_choices(choices).with_errors(errors)

    def with_errors(self, errors: ErrorTable) -> Prepared:
        """Returns the same with other gradient errors."""
        problem = with_codec_options(self.problem, self.layout, self.profile, self.choices, errors)
        return dataclasses.replace(self, problem=problem)

    def expecting_drops(self, dropped: frozenset[int]) -> Prepared:
        """Returns the same where other outputs are dropped before the backward pass."""
        outputs, mutations = held_and_dropped(self.joint, self.layout, dropped)
        problem = dataclasses.replace(self.problem, outputs=outputs, mutations=mutations)
        expected = dataclasses.replace(self.expected, dropped=dropped)
        return dataclasses.replace(self, expected=expected, problem=problem)

    @cached_property
    def gradient_nodes(self) -> Mapping[int, fx.Node]:
        """The gradients that the graph returns, by position of the input."""
        results = zip(self.joint.output_nodes, self.joint.outputs, strict=True)
        return {role.of: node for node, role in results if role.kind is OutputKind.GRADIENT and node is not None}

    @property
    def parameter_gradients(self) -> frozenset[int]:
        """Positions of the parameters, among the graph's inputs, whose gradients are returned."""
        return frozenset(i for i in self.gradient_nodes if self.joint.inputs[i].kind is InputKind.PARAMETER)

    def keeping(self, positions: Iterable[int]) -> Prepared:
        """Returns the same where these gradients live to the end of the backward pass, and no others."""
        nodes = {**take_nodes(self.joint), **self.gradient_nodes}
        kept = {t for i in positions if i in nodes for t in self.layout.storages_of.get(nodes[i], ())}
        problem = dataclasses.replace(self.problem, gradients=tuple(sorted(kept)))
        return dataclasses.replace(self, problem=problem)

    def adding(self, positions: frozenset[int]) -> Prepared:
        """Returns the same where gradients of some inputs are added to older ones as soon as they are made."""
        return self.keeping(self.gradient_nodes.keys() - positions)


def prepare(step: Step, call: StepCall, options: Options) -> Prepared:
    """Captures a step and measures its operators; runs neither the model nor its backward pass."""
    return prepare_traced(trace(step, call, options), ALL_ARRIVE)


def trace(step: Step, call: StepCall, options: Options) -> Traced:
    """Captures a step and rewrites it to its canonical form, in the layouts that are fastest here."""
    traced = trace_plain(step, call, options)
    if not options.reordered:
        return traced
    return traced.in_layout(groups_that_pay(traced.capture.joint, traced.plain))


def trace_plain(step: Step, call: StepCall, options: Options) -> Traced:
    """Captures a step and rewrites it to its canonical form, in eager's layouts; times nothing."""
    with stage("capture"), paused_collector():
        captured = capture(step, tuple(call), exact=not options.reordered)
    return canonical(captured, output_structure(captured, step, call), step, call, options)


def canonical(captured: Capture, structure: OutputStructure, step: Step, call: StepCall, options: Options) -> Traced:
    """Rewrites a captured step to its canonical form, in eager's layouts."""
    joint = canonicalize(captured.joint)
    resident_bytes = resident_bytes_of(step, call, options) + captured.float_bytes
    lossless = options.compression != "off"
    rise_bytes, updates = update_of(captured, step, options)
    return Traced(
        captured,
        joint,
        joint,
        (),
        structure,
        resident_bytes,
        rise_bytes,
        updates,
        options.lossy,
        lossless,
        options.reordered,
    )


def update_of(captured: Capture, step: Step, options: Options) -> tuple[int | None, ParameterUpdates | None]:
    """Returns how far memory rises while the optimizer steps, or what does that within the backward pass."""
    if options.optimizer is None:
        return None, None
    if not options.step_in_backward:
        return optimizer_bytes(options.optimizer).rise_bytes, None
    named = dict(step.named_parameters())
    trained = {i: named[name] for i, name in enumerate(captured.flat_names) if name in named}
    return None, updates_of(options.optimizer, {i: p for i, p in trained.items() if p.requires_grad})


def prepare_traced(traced: Traced, expected: ExpectedBackward) -> Prepared:
    """Measures the operators of a step, with the backward pass that is expected."""
    joint = expected_joint(traced.joint, traced, expected)
    layout = layout_of(joint)
    choices = codec_choices(layout, lossy=traced.lossy, lossless=traced.lossless)
    refusals = codec_refusals(layout, lossy=traced.lossy, lossless=traced.lossless)
    with stage("profile"):
        profile = _profile(layout, choices)
    errors = error_table(lossy_groups(layout, choices), choices, lambda _: DEFAULT_GROUP_ERROR)
    return prepared_for(traced, expected, joint, layout, profile, choices, refusals, errors)


def _profile(layout: Layout, choices: CodecChoices) -> Profile:
    return profile_calls([*calls_of(layout, choices), *faster_calls(layout)])


def expected_joint(joint: JointGraph, traced: Traced, expected: ExpectedBackward) -> JointGraph:
    """Returns the joint graph of an expected backward pass, which updates parameters if it is to."""
    joint = prune_tangents(joint, expected.absent) if expected.absent else joint
    joint = multiply_by_slices(joint) if traced.any_order else joint
    return joint if traced.updates is None else updating_parameters(joint, traced.updates.rise_bytes.keys())


def prepared_for(
    traced: Traced,
    expected: ExpectedBackward,
    joint: JointGraph,
    layout: Layout,
    profile: Profile,
    choices: CodecChoices,
    refusals: Mapping[str, str],
    errors: ErrorTable,
) -> Prepared:
    """Builds the planning problem of what was prepared so far."""
    rises = None if traced.updates is None else traced.updates.rise_bytes
    problem = problem_of(joint, layout, profile, choices, errors, traced.resident_bytes, expected.absent, rises)
    if traced.update_rise_bytes is not None:
        problem = with_update(problem, traced.update_rise_bytes)
    prepared = Prepared(traced, ALL_ARRIVE, joint, layout, profile, choices, refusals, problem)
    prepared = dataclasses.replace(prepared, expected=dataclasses.replace(expected, dropped=frozenset()))
    return prepared.expecting_drops(expected.dropped) if expected.dropped else prepared


def resident_bytes_of(step: Step, call: StepCall, options: Options) -> int:
    """Counts what is alive through the whole step, however many graphs it takes."""
    tensors: list[Tensor] = [*step.parameters(), *step.buffers(), *call.tensors]
    return storage_bytes(tensors) + optimizer_bytes(options.optimizer).state_bytes + options.reserve_bytes


def schedule_of(
    prepared: Prepared, actions: Actions, headroom: Headroom = NO_HEADROOM, dying: Sequence[DyingTangent] = ()
) -> Schedule:
    """Returns the schedule by which a plan is carried out.

    Args:
        prepared: the problem.
        actions: of the plan.
        headroom: how far the halves may rise beyond what they take by it.
        dying: tangents that nobody keeps.
    """
    schedule = lower(prepared.problem, actions)
    if prepared.sharing is not None:
        return schedule
    problem, layout = prepared.problem, prepared.layout
    schedule = with_faster_forms(problem, layout, prepared.profile.costs, schedule, headroom.backward_bytes)
    tangents = prepared.joint.tangents
    return in_place(problem, layout, schedule, headroom, {tangents[each.position]: each.last for each in dying})


def build_graphs(prepared: Prepared, actions: Actions) -> SplitGraphs:
    """Builds the halves of a step by a plan, or takes those that other sizes have."""
    return scheduled_graphs(prepared, schedule_of(prepared, actions))


def scheduled_graphs(prepared: Prepared, schedule: Schedule) -> SplitGraphs:
    """Builds the halves of a step by a schedule, or takes those that other sizes have."""

    def build() -> SplitGraphs:
        with stage("rewrite"), paused_collector():
            return split(rewrite(prepared.joint, prepared.layout, schedule))

    return build() if prepared.sharing is None else prepared.sharing.graphs(schedule, build)
