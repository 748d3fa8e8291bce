"""A kind of call with symbolic sizes: captured once, planned in full at some sizes, and derived for all others.

At new sizes nothing is traced, timed or calibrated: the graph is made concrete, seconds are scaled by the work, and the
plans that were found at the reference's sizes are simulated. Only where none of them fits is there a search.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

from fxhybrid.accuracy.replan_loop import MeasuredErrors
from fxhybrid.accuracy.verifier import CaptureCheck
from fxhybrid.capture.capture import Capture
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.capture.symbolic import Sizes, SymbolicCapture
from fxhybrid.codecs import TensorMeta, codec_kind, get_codec
from fxhybrid.compiler.call_state import FRESH
from fxhybrid.compiler.later_graphs import LaterCosts, LaterJointGraph, LaterLayout
from fxhybrid.compiler.planner import PlanMaker
from fxhybrid.compiler.planning_state import PlanningState, search
from fxhybrid.compiler.scaled_profile import StepCalls, scaled_profile
from fxhybrid.compiler.size_template import SizedFigures, SizedStep, SizeTemplate, template_of
from fxhybrid.ir.plan import SAVE, Action, Actions, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.passes.build_problem import CodecChoices
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.codec_choices import codec_choices
from fxhybrid.passes.concretize import SymbolicGraph
from fxhybrid.passes.error_prior import ErrorTable
from fxhybrid.passes.storages import Layout, layout_of
from fxhybrid.passes.traced import Traced
from fxhybrid.pipeline import Prepared, canonical, expected_joint, prepared_for, resident_bytes_of, update_of
from fxhybrid.profiling.op_profiler import Profile
from fxhybrid.solvers.portfolio.known_plans import KnownPlan, KnownPlans, judged_again, pareto, plans_of

Specs = dict[tuple[int, str], str]  # codec by storage and the codec that stands for it at other sizes


@dataclass(frozen=True, eq=False)
class SizeFamily:
    """Joins a capture with symbolic sizes and the state that was planned in full.

    Attributes:
        kind: of the calls, as ``CallShape`` tells it.
        symbolic: the capture.
        graph: its joint graph, ready to be made concrete.
        reference: a state of the same step at some sizes.
        sized: its canonical form for many sizes; None where that depends on them.
        measured: calls at sizes of references, by their layout.
        templates: the same step for many sizes, by the layouts of references.
    """

    kind: Hashable
    symbolic: SymbolicCapture
    graph: SymbolicGraph
    reference: PlanningState
    sized: SizedStep | None
    measured: WeakKeyDictionary[Layout, StepCalls] = field(default_factory=WeakKeyDictionary)
    templates: WeakKeyDictionary[Layout, SizeTemplate | None] = field(default_factory=WeakKeyDictionary)

    def sizes_of(self, step: Step, call: StepCall) -> Sizes | None:
        """Returns the sizes of a call; None where the capture does not hold for it."""
        sizes = self.symbolic.sizes(step, *call)
        return sizes if sizes is not None and self.symbolic.capture.holds(step, *call) else None

    def state_at(self, step: Step, call: StepCall, sizes: Sizes, budget_bytes: int) -> PlanningState:
        """Plans a call of new sizes by what is known of the reference."""
        reference = self.reference
        prepared, initial_choices, specs = self._prepared_at(step, call, sizes)
        save_all_bytes = simulate_actions(prepared.problem, {}).peak_bytes
        check = reference.capture_check
        state = replace(
            reference,
            prepared=prepared,
            initial_choices=initial_choices,
            plans=_known_plans(reference.plans, prepared.problem, specs),
            errors=MeasuredErrors(reference.errors.pairs),
            budget_bytes=budget_bytes,
            save_all_bytes=save_all_bytes,
            capture_check=CaptureCheck(check.difference, f"made of one for all sizes; at other sizes: {check.note}"),
            adopted=None,
        )
        state = search(state, FRESH) if state.plans.plans else state
        if state.plans.cheapest(budget_bytes) is not None:
            return state
        return search(replace(state, plans=PlanMaker(state.options, budget_bytes)(prepared.problem)), FRESH)

    def plans_at(self, step: Step, call: StepCall, sizes: Sizes) -> tuple[Prepared, KnownPlans]:
        """Returns the step at some sizes, and the reference's plans for it; searches none.

        Args:
            step: model and loss.
            call: of any sizes; its own bytes count.
            sizes: by the symbol's name.

        Raises:
            ProfileError: memory does not suffice for an operator.
        """
        prepared, _, specs = self._prepared_at(step, call, sizes)
        return prepared, _known_plans(self.reference.plans, prepared.problem, specs)

    def _prepared_at(self, step: Step, call: StepCall, sizes: Sizes) -> tuple[Prepared, CodecChoices, Specs]:
        """Prepares a call from the template of all sizes where that holds for it."""
        old = self.reference.prepared
        if old.layout not in self.templates:
            self.templates[old.layout] = template_of(self.sized, old, StepCalls(old.layout, old.choices))
        template = self.templates[old.layout]
        figures = None if template is None else template.figures(sizes)
        if template is None or figures is None:
            return self._prepared_alone(step, call, sizes)
        initial = template.offered(figures)
        specs = _resized_specs(old, template.names, figures.metas, initial)
        choices = _choices(specs, old.choices)
        later = _LaterGraphs(self.graph, old, sizes)
        traced = self._traced_later(step, call, figures, later)
        errors = _resized_errors(old, specs)
        problem = template.problem(figures, specs, choices, errors, traced.resident_bytes, traced.update_rise_bytes)
        roles = self.graph.joint
        joint = LaterJointGraph(lambda: later.pruned, inputs=roles.inputs, outputs=roles.outputs)
        costs = LaterCosts(lambda: self._scaled(old, specs, later.layout, choices).costs)
        profile = Profile(old.profile.device, costs)
        layout = LaterLayout(lambda: later.layout)
        sharing = template.sharing_at(sizes)
        prepared = Prepared(traced, old.expected, joint, layout, profile, choices, old.refusals, problem, sharing)
        return prepared, initial, specs

    def _traced_later(self, step: Step, call: StepCall, figures: SizedFigures, later: _LaterGraphs) -> Traced:
        """Returns the traced form of a call whose graphs are built when they are read."""
        old, options, roles = self.reference.prepared.traced, self.reference.options, self.graph.joint
        captured = self._capture_at(
            figures.sizes, LaterJointGraph(lambda: later.captured, inputs=roles.inputs, outputs=roles.outputs)
        )
        joint = LaterJointGraph(lambda: later.canonical, inputs=roles.inputs, outputs=roles.outputs)
        rise_bytes, updates = update_of(captured, step, options)
        return replace(
            old,
            capture=captured,
            joint=joint,
            plain=joint,
            resident_bytes=resident_bytes_of(step, call, options) + captured.float_bytes,
            update_rise_bytes=rise_bytes,
            updates=updates,
            known_interface=figures.interface,
        )

    def _prepared_alone(self, step: Step, call: StepCall, sizes: Sizes) -> tuple[Prepared, CodecChoices, Specs]:
        """Prepares a call from graphs of its own sizes."""
        old = self.reference.prepared
        captured = self._capture_at(sizes, self.graph.at(sizes))
        traced = canonical(captured, old.traced.structure, step, call, self.reference.options)
        traced = traced.in_layout(old.traced.channels_last)
        joint = expected_joint(traced.joint, traced, old.expected)
        layout = layout_of(joint)
        initial = codec_choices(layout, lossy=traced.lossy, lossless=traced.lossless)
        metas = {t: TensorMeta.of(s.base.meta["val"]) for t, s in enumerate(layout.storages) if s.base is not None}
        specs = _resized_specs(old, [s.name for s in layout.storages], metas, initial)
        choices = _choices(specs, old.choices)
        profile, errors = self._scaled(old, specs, layout, choices), _resized_errors(old, specs)
        prepared = prepared_for(traced, old.expected, joint, layout, profile, choices, old.refusals, errors)
        return prepared, initial, specs

    def _scaled(self, old: Prepared, specs: Specs, layout: Layout, choices: CodecChoices) -> Profile:
        """Returns the profile of a layout at new sizes."""
        measured = {t: tuple(spec for spec in old.choices[t] if (t, spec) in specs) for t in choices}
        return scaled_profile(old.profile, self._calls_at(old, measured), StepCalls(layout, choices))

    def _calls_at(self, reference: Prepared, measured: CodecChoices) -> StepCalls:
        """Returns what was measured at the reference's sizes; most sizes ask for the same."""
        known = self.measured.get(reference.layout)
        if known is None or known.choices != measured:
            known = self.measured[reference.layout] = StepCalls(reference.layout, measured)
        return known

    def _capture_at(self, sizes: Mapping[str, int], joint: JointGraph) -> Capture:
        """Returns the capture at some sizes, which holds for calls of these only."""
        symbolic, fixed = self.symbolic, dict(sizes)

        def holds(*call: object) -> bool:
            return symbolic.sizes(*call) == fixed and symbolic.capture.holds(*call)

        return replace(symbolic.capture, joint=joint, holds=holds)


class _LaterGraphs:
    """Builds the graphs of some sizes when they are read."""

    def __init__(self, graph: SymbolicGraph, old: Prepared, sizes: Sizes) -> None:
        self._graph, self._old, self._sizes = graph, old, dict(sizes)

    @cached_property
    def captured(self) -> JointGraph:
        return self._graph.at(self._sizes)

    @cached_property
    def canonical(self) -> JointGraph:
        return canonicalize(self.captured)

    @cached_property
    def pruned(self) -> JointGraph:
        return expected_joint(self.canonical, self._old.traced, self._old.expected)

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.pruned)


def _resized_errors(old: Prepared, specs: Specs) -> ErrorTable:
    """Returns the errors of codecs as those that they stand for have at other sizes."""
    return {
        (t, specs[t, option.codec]): option.error
        for t, tensor in enumerate(old.problem.tensors)
        for option in tensor.codecs
        if not option.lossless and (t, option.codec) in specs
    }


def _resized_specs(
    old: Prepared, names: Sequence[str], metas: Mapping[int, TensorMeta], offered: CodecChoices
) -> Specs:
    """Finds, for each codec of the reference, the one of the same kind that the same storage is offered now.

    Where storages are others, since a rewrite depends on sizes, there is none.
    """
    if [s.name for s in old.layout.storages] != names:
        return {}
    found: Specs = {}
    for t, specs in old.choices.items():
        kinds = {codec_kind(spec): spec for spec in offered.get(t, ())}
        for spec in specs:
            kind = codec_kind(spec)
            if kind in kinds:
                found[t, spec] = kinds[kind]
            elif kind == "channelwise" and kinds and old.meta(t).shape[1:] == metas[t].shape[1:]:
                found[t, spec] = spec  # only the number of samples differs: widths are chosen for channels
    return found


def _choices(specs: Specs, old: CodecChoices) -> CodecChoices:
    """Returns the codecs to offer, in the order of the reference's."""
    found: dict[int, tuple[str, ...]] = {}
    for t, each in old.items():
        kept = tuple(specs[t, spec] for spec in each if (t, spec) in specs)
        if kept:
            found[t] = kept
    return found


def _known_plans(known: KnownPlans, problem: Problem, specs: Specs) -> KnownPlans:
    """Returns the reference's plans as plans of another size, most of them still to be simulated."""
    if [t.name for t in known.problem.tensors] != [t.name for t in problem.tensors]:
        return plans_of(problem, max_error=known.max_error)

    def resized(plan: KnownPlan) -> KnownPlan:
        return replace(plan, point=replace(plan.point, actions=_resized_actions(plan.point.actions, specs)))

    others = tuple(resized(plan) for plan in pareto((*known.plans, *known.from_other_sizes)))
    fallback = tuple(map(resized, known.fallback))
    return judged_again(replace(known, plans=others, fallback=fallback, from_other_sizes=(), fixed=False), problem)


def _resized_actions(actions: Actions, specs: Specs) -> dict[int, Action]:
    return {t: _resized_action(t, action, specs) for t, action in actions.items()}


def _resized_action(t: int, action: Action, specs: Specs) -> Action:
    """Returns the action with the codec that stands for its own: another precise enough, or none, where it is gone."""
    if not isinstance(action, Compress):
        return action
    if (t, action.codec) in specs:
        return Compress(specs[t, action.codec])
    noise = get_codec(action.codec).noise
    other = [spec for (storage, _), spec in specs.items() if storage == t and get_codec(spec).noise <= noise]
    return Compress(max(other, key=lambda spec: get_codec(spec).noise)) if other and noise else SAVE
