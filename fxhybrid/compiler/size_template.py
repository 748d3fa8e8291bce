"""A step with symbolic sizes up to the planning problem: a new size costs arithmetic, and no graph.

Canonical form, layout and rewritten graphs are made once, of the symbolic graph. What passes decide by sizes on the way
is noted as conditions; sizes that do not meet them are prepared by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.origins import origins
from fxhybrid.capture.symbolic import SizeDecisions, SymbolicCapture
from fxhybrid.codecs import TensorMeta
from fxhybrid.compiler.scaled_profile import StepCalls
from fxhybrid.compiler.sized_costs import CodecKey, SizedCalls
from fxhybrid.console import stage
from fxhybrid.errors import CaptureError
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule
from fxhybrid.passes.build_problem import CodecChoices, ops_of, tensors_of, with_update
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.codec_choices import OfferRules
from fxhybrid.passes.concretize import ConcreteTensors, SymbolicGraph, value_recipe
from fxhybrid.passes.error_prior import ErrorTable
from fxhybrid.passes.fingerprint import fingerprint
from fxhybrid.passes.size_program import SYMBOLIC, SizeProgram, Sizes, Values
from fxhybrid.passes.sized_halves import SharedGraphs, SizedHalves
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.passes.storages import Layout, Storage, layout_of
from fxhybrid.pipeline import Prepared, expected_joint

MAX_SHARED = 64  # halves for many sizes that are kept, of the plans that were carried out last
POOL = torch.ops.aten.max_pool2d_with_indices.default


@dataclass(frozen=True, eq=False)
class SizedStep:
    """Holds the canonical form of a step with symbolic sizes.

    Attributes:
        symbolic: its capture.
        graph: its joint graph.
        joint: the canonical form, for all sizes that leave out the same calls and meet what was decided.
        left_out: which calls are left out, of those that may give their input.
    """

    symbolic: SymbolicCapture
    graph: SymbolicGraph
    joint: JointGraph
    left_out: tuple[bool, ...]

    @classmethod
    def of(cls, symbolic: SymbolicCapture, graph: SymbolicGraph, sizes: Sizes) -> SizedStep:
        """Brings a symbolic graph to its canonical form, and compares it with the static one at some sizes.

        Raises:
            CaptureError: it is something else there, or fixes a size.
        """
        with symbolic.decisions.allowed():
            joint = canonicalize(graph.symbolic_at(sizes))
        if symbolic.decisions.taken() is None:
            raise CaptureError("the canonical form of the step fixes a size")
        if fingerprint(SymbolicGraph(joint).at(sizes)) != fingerprint(canonicalize(graph.at(sizes))):
            raise CaptureError("the canonical form of the step depends on sizes")
        return cls(symbolic, graph, joint, graph.left_out(sizes))


@dataclass(frozen=True, eq=False)
class SizedFigures:
    """Holds the figures of a step at some sizes.

    Attributes:
        sizes: by the symbol's name.
        values: what the template's program comes to.
        storage_bytes: bytes of each storage.
        metas: by storage, of those that some node reads whole.
        interface: of the step.
    """

    sizes: Sizes
    values: Values
    storage_bytes: Sequence[int]
    metas: Mapping[int, TensorMeta]
    interface: StepInterface


class SizeTemplate:
    """Holds one prepared step of a family with symbolic sizes.

    Attributes:
        names: of the storages.
    """

    def __init__(self, step: SizedStep, old: Prepared, measured: StepCalls) -> None:
        """Prepares a symbolic step as it was prepared at other sizes.

        Args:
            step: with symbolic sizes.
            old: the same step at some sizes, in eager's layouts.
            measured: its calls.

        Raises:
            CaptureError: it depends on sizes in another way than by arithmetic.
        """
        decisions, program = step.symbolic.decisions, SizeProgram()
        self._step, self._old, traced = step, old, old.traced
        with decisions.allowed():
            self._joint = expected_joint(step.joint, traced, old.expected)
            self._layout = layout_of(self._joint)
            if measured.names != StepCalls(self._layout, {}).names:
                raise CaptureError("the step has other operators with symbolic sizes")
            _check_pools(self._joint)
            self._bytes = [program.place(storage.size_bytes) for storage in self._layout.storages]
            bases = {t: s.base.meta["val"] for t, s in enumerate(self._layout.storages) if s.base is not None}
            self._bases = {t: _Base(value, program) for t, value in bases.items()}
            self._calls = SizedCalls(self._layout, old.profile, measured, program)
            self._interface = _Interface(step.joint, program)
            tangents = StepInterface.of(step.joint).tangent_values
            arriving = (value for k, value in enumerate(tangents) if k not in old.expected.absent)
            self._tangent_bytes = program.place(sum(value.untyped_storage().nbytes() for value in arriving))
        decided = decisions.taken()
        if decided is None:
            raise CaptureError("the layout of the step fixes a size")
        self._conditions = [program.place(condition) for condition in decided]
        self._evaluate = program.compiled()
        self._rules = OfferRules(self._layout, traced.lossy, traced.lossless)
        self._places = {node: str(origin) for node, origin in origins(self._joint.module.graph.nodes).items()}
        self.names = [storage.name for storage in self._layout.storages]
        self._shared = _Shared(self._joint, self._layout, decisions)

    def figures(self, sizes: Sizes) -> SizedFigures | None:
        """Works out the figures of some sizes; None where the step is another one there."""
        if self._step.graph.left_out(sizes) != self._step.left_out:
            return None
        values = self._evaluate(sizes)
        if not all(values[place] for place in self._conditions):
            return None
        metas = {t: base.meta(values) for t, base in self._bases.items()}
        return SizedFigures(sizes, values, [values[i] for i in self._bytes], metas, self._interface.at(values))

    def offered(self, figures: SizedFigures) -> CodecChoices:
        """Returns the codecs that storages are offered."""
        return self._rules.resized(figures.storage_bytes, figures.metas).choices()

    def problem(
        self,
        figures: SizedFigures,
        specs: Mapping[CodecKey, str],
        choices: CodecChoices,
        errors: ErrorTable,
        resident_bytes: int,
        update_rise_bytes: int | None,
    ) -> Problem:
        """Builds the planning problem.

        Args:
            figures: of the sizes.
            specs: by storage and codec of the step as measured, the codec that stands for it.
            choices: those codecs by storage.
            errors: of the lossy ones.
            resident_bytes: everything that is alive through the whole step.
            update_rise_bytes: how far memory rises while the optimizer steps; None where that is not to be planned.

        Raises:
            ProfileError: memory does not suffice for an operator.
        """
        values, fakes = figures.values, ConcreteTensors()
        bases = {t: self._bases[t].recipe(values, fakes) for t in choices}
        costs = self._calls.costs(figures.sizes, values, figures.metas, specs, bases)
        sized = zip(self.names, figures.storage_bytes, strict=True)
        updates = self._old.traced.updates
        rises = {} if updates is None else updates.rise_bytes
        forward, backward = ops_of(self._layout, costs, self._places, rises)
        problem = replace(
            self._old.problem,
            tensors=tensors_of([Storage(name, size, None) for name, size in sized], costs, choices, errors),
            forward=forward,
            backward=backward,
            resident_bytes=resident_bytes,
            tangent_bytes=values[self._tangent_bytes],
        )
        return problem if update_rise_bytes is None else with_update(problem, update_rise_bytes)

    def sharing_at(self, sizes: Sizes) -> SharedAtSizes:
        """Returns what runs halves for many sizes at these."""
        return SharedAtSizes(self._shared, sizes)


class _Base:
    """Makes the fake value of a storage at some sizes, or only its meta."""

    def __init__(self, value: Tensor, program: SizeProgram) -> None:
        self.recipe = value_recipe(value, program)
        self._shape, self._stride = tuple(map(program.place, value.shape)), tuple(map(program.place, value.stride()))
        self._dtype = value.dtype

    def meta(self, values: Values) -> TensorMeta:
        shape, stride = tuple(values[i] for i in self._shape), tuple(values[i] for i in self._stride)
        return TensorMeta(shape, stride, self._dtype)


class _Interface:
    """Makes a step's interface at some sizes."""

    def __init__(self, joint: JointGraph, program: SizeProgram) -> None:
        self._symbolic = found = StepInterface.of(joint)
        self._gradients, self._tangents = (
            [value_recipe(value, program) for value in values]
            for values in (found.gradient_values, found.tangent_values)
        )

    def at(self, values: Values) -> StepInterface:
        fakes = ConcreteTensors()
        gradients, tangents = (
            tuple(recipe(values, fakes) for recipe in recipes) for recipes in (self._gradients, self._tangents)
        )
        return replace(self._symbolic, gradient_values=gradients, tangent_values=tangents)


class _Shared:
    """Keeps halves for many sizes by the schedule that they carry out."""

    def __init__(self, joint: JointGraph, layout: Layout, decisions: SizeDecisions) -> None:
        self._joint, self._layout, self._decisions = joint, layout, decisions
        self._halves: dict[Hashable, SizedHalves | None] = {}

    def halves(self, schedule: Schedule) -> SizedHalves | None:
        """Returns the halves; None where they would depend on sizes in another way."""
        steps = tuple((i.kind, i.op, i.codec, i.reads, i.writes) for i in schedule.instructions)
        key = steps, schedule.n_forward
        if key in self._halves:
            self._halves[key] = self._halves.pop(key)
            return self._halves[key]
        while len(self._halves) >= MAX_SHARED:
            del self._halves[next(iter(self._halves))]
        before = self._decisions.taken()
        with stage("rewrite"), self._decisions.allowed():
            made = SizedHalves(self._joint, self._layout, schedule)
        self._halves[key] = made if self._decisions.taken() == before else None
        return self._halves[key]


@dataclass(frozen=True, eq=False)
class SharedAtSizes:
    """Runs halves for many sizes at some of them."""

    shared: _Shared
    sizes: Sizes

    def graphs(self, schedule: Schedule, build: Callable[[], SplitGraphs]) -> SplitGraphs:
        """Returns the halves of a schedule; those for these sizes alone are built when somebody reads them."""
        halves = self.shared.halves(schedule)
        return build() if halves is None else SharedGraphs(halves, self.sizes, build)


def _check_pools(joint: JointGraph) -> None:
    """Refuses pools over images of symbolic sizes: codecs of their indices count with numbers."""
    for node in joint.module.graph.find_nodes(op="call_function", target=POOL):
        if any(isinstance(size, SYMBOLIC) for size in node.args[0].meta["val"].shape[-2:]):
            raise CaptureError("a pool runs over images of symbolic sizes")


def sized_step(symbolic: SymbolicCapture, graph: SymbolicGraph, sizes: Sizes) -> SizedStep | None:
    """Returns the canonical form for many sizes, compared with that of some; None where it depends on them."""
    try:
        return SizedStep.of(symbolic, graph, sizes)
    except Exception:  # noqa: BLE001 (symbolic arithmetic raises whatever it likes)
        return None


def template_of(step: SizedStep | None, old: Prepared, measured: StepCalls) -> SizeTemplate | None:
    """Returns the template of a step as it was prepared at some sizes; None where each size needs graphs of its own."""
    if step is None or old.traced.channels_last:
        return None
    try:
        return SizeTemplate(step, old, measured)
    except Exception:  # noqa: BLE001 (symbolic arithmetic raises whatever it likes)
        return None
