"""The planning problem: plain numbers, no torch.

A training step is two straight-line programs, forward and backward, over storages. Every storage that the
forward program makes and the backward program reads is a decision: save it, keep an encoded form of it, or
recompute it. Parameters, buffers and inputs are resident: always there, never decided, summed up in
``resident_bytes``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fxhybrid.errors import ProblemError
from fxhybrid.ir.dependencies import (
    BACKWARD,
    FORWARD,
    TENSOR,
    Node,
    ancestors,
    dependency_graph,
    find_cycle,
)
from fxhybrid.ir.json_text import from_json, to_json
from fxhybrid.ir.program import (
    CodecOption,
    Fusion,
    Op,
    Tensor,
    check_number,
    check_op,
    check_tensor,
    op_from_json,
    tensor_from_json,
)

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "CodecOption",
    "Fusion",
    "Op",
    "Problem",
    "Tensor",
    "check_problem",
    "single_techniques",
    "without_codecs",
    "without_recomputation",
]

MAX_TENSORS = 200_000  # a planner would work for hours on more, and no traced step comes near


@dataclass(frozen=True)
class Problem:
    """Holds a training step as numbers.

    Attributes:
        tensors: all storages, made by forward or backward.
        forward: forward ops in the order in which they run.
        backward: backward ops in the order in which they run.
        outputs: tensors that the caller holds from the end of forward to the end of backward.
        mutations: tensors that live to the end of forward, where they are copied into buffers or the caller drops them.
        gradients: tensors that live to the end of backward.
        resident_bytes: parameters, buffers, inputs, optimizer state, and what the user keeps free.
        tangent_bytes: gradients of the outputs, alive through the whole backward pass.

    A new constant of the peak is one more field here, with a name in ``_bytes`` and a default, which
    ``forward_base_bytes`` and ``backward_base_bytes`` add up: simulator, bounds and solvers read nothing else.
    """

    tensors: tuple[Tensor, ...]
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    outputs: tuple[int, ...]
    mutations: tuple[int, ...]
    gradients: tuple[int, ...]
    resident_bytes: int
    tangent_bytes: int = 0

    @property
    def forward_base_bytes(self) -> int:
        """Bytes that no plan changes while forward ops run; what the ops make comes on top."""
        return self.resident_bytes

    @property
    def backward_base_bytes(self) -> int:
        """Bytes that no plan changes while backward ops run; what the ops make comes on top."""
        return self.resident_bytes + self.tangent_bytes

    @cached_property
    def producer(self) -> dict[int, int]:
        """Forward op that makes each forward tensor."""
        return {t: i for i, op in enumerate(self.forward) for t in op.outputs}

    @cached_property
    def index(self) -> dict[str, int]:
        """Tensor index by name."""
        return {tensor.name: i for i, tensor in enumerate(self.tensors)}

    @cached_property
    def backward_reads(self) -> dict[int, int]:
        """Forward tensors that the backward program reads, with the first backward op that does."""
        return {t: positions[0] for t, positions in self.direct_reads.items()}

    @cached_property
    def direct_reads(self) -> dict[int, tuple[int, ...]]:
        """Positions of the backward ops that read each forward tensor."""
        reads: dict[int, list[int]] = {}
        for position, op in enumerate(self.backward):
            for t in op.inputs:
                if t in self.producer:
                    reads.setdefault(t, []).append(position)
        return {t: tuple(positions) for t, positions in reads.items()}

    @cached_property
    def dependencies(self) -> nx.DiGraph[Node]:
        """The step's dependency graph; nodes are ``("forward", op)``, ``("backward", op)`` and ``("tensor", t)``."""
        return dependency_graph(self.forward, self.backward)

    @cached_property
    def _always_required(self) -> frozenset[Node]:
        """Forward ops, as nodes, that run in the forward pass of every plan."""
        held = {*self.outputs, *self.mutations, *self.gradients}
        ends = [(FORWARD, i) for i, op in enumerate(self.forward) if op.pinned or not held.isdisjoint(op.outputs)]
        return frozenset(node for node in ancestors(self.dependencies, ends) if node[0] == FORWARD)

    def required_forward_ops(self, kept: Iterable[int] = ()) -> frozenset[int]:
        """Returns the forward ops that run in the forward pass of every plan that keeps the tensors ``kept``.

        They are pinned, or somebody holds what they make, or such an op or a kept tensor depends on them.
        """
        makers = {(FORWARD, self.producer[t]) for t in kept} - self._always_required
        more = ancestors(self.dependencies, makers, blocked=self._always_required)
        return frozenset(i for kind, i in (*self._always_required, *more) if kind == FORWARD)

    @cached_property
    def deferrable(self) -> frozenset[int]:
        """Forward ops that only serve the backward pass (masks, offsets): running them there instead is free."""
        required = self.required_forward_ops()
        return frozenset(i for i, op in enumerate(self.forward) if op.recomputable and i not in required)

    @cached_property
    def unneeded(self) -> frozenset[int]:
        """Forward ops that run in no plan: they only served branches of the backward pass that are left out."""
        return frozenset(range(len(self.forward))) - self.required_forward_ops(self.backward_reads)

    @cached_property
    def fused_masks(self) -> frozenset[int]:
        """Forward ops that make a mask which, unless kept, its reader does without."""
        return frozenset(op.fusion.op for op in self.backward if op.fusion)

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """Forward tensors on which a decision can matter: read by backward directly or through a chain."""
        run_once = {(FORWARD, i) for i, op in enumerate(self.forward) if not op.recomputable}
        read = ((TENSOR, t) for t in self.backward_reads)
        reached = ancestors(self.dependencies, read, blocked=run_once)
        held = set(self.outputs)
        return tuple(sorted(t for kind, t in reached if kind == TENSOR and t not in held))

    @cached_property
    def step_s(self) -> float:
        """Seconds of the save-all step; masks are fused into their readers then."""
        ops = [op for i, op in enumerate(self.forward) if i not in self.fused_masks | self.unneeded]
        return math.fsum(op.seconds for op in [*ops, *self.backward])

    def top_bytes(self, op: Op) -> int:
        """Returns how far memory rises above what was alive while ``op`` runs."""
        return max(op.alloc_peak_bytes, sum(self.tensors[t].size_bytes for t in op.outputs))

    def __str__(self) -> str:
        return (
            f"Problem: {len(self.forward)} forward and {len(self.backward)} backward ops, "
            f"{len(self.tensors)} tensors, {len(self.candidates)} candidates, step {self.step_s * 1e3:.1f} ms"
        )

    def to_json(self) -> str:
        """Writes this problem as JSON text."""
        raw = dataclasses.asdict(self)
        for op in (*raw["forward"], *raw["backward"]):
            if not op["place"]:
                del op["place"]
        return to_json(raw)

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """Reads and checks the problem that ``to_json`` wrote.

        Raises:
            ProblemError: the text is no problem, or a malformed one.
        """

        def build(raw: dict[str, Any]) -> Problem:
            return cls(
                tensors=tuple(tensor_from_json(t) for t in raw["tensors"]),
                forward=tuple(op_from_json(o) for o in raw["forward"]),
                backward=tuple(op_from_json(o) for o in raw["backward"]),
                outputs=tuple(raw["outputs"]),
                mutations=tuple(raw["mutations"]),
                gradients=tuple(raw["gradients"]),
                resident_bytes=raw["resident_bytes"],
                **{name: raw[name] for name in OPTIONAL_FIELDS if name in raw},
            )

        problem = from_json(text, build, ProblemError, "not a problem in JSON form")
        check_problem(problem)
        return problem


OPTIONAL_FIELDS = tuple(f.name for f in dataclasses.fields(Problem) if f.default is not dataclasses.MISSING)


def check_problem(problem: Problem) -> None:
    """Refuses malformed problems.

    Raises:
        ProblemError: no ops at all, unknown references, a read before the write, two writers, duplicate names,
            a number that is negative, not finite or not a number, or more than ``MAX_TENSORS`` tensors.
    """
    count = len(problem.tensors)
    if count > MAX_TENSORS:
        raise ProblemError(f"the problem has {count} tensors; at most {MAX_TENSORS} can be planned")
    if not problem.forward and not problem.backward:
        raise ProblemError("the problem is empty: no op runs in forward or backward, so there is nothing to plan")
    _check_numbers(problem)
    if len(problem.index) != count:
        raise ProblemError("two tensors share a name")
    _check_references(problem)
    _check_order(problem)
    _check_fusions(problem)


def _check_numbers(problem: Problem) -> None:
    for tensor in problem.tensors:
        check_tensor(tensor)
    for op in problem.forward + problem.backward:
        check_op(op)
    for field in dataclasses.fields(problem):
        if field.name.endswith("_bytes"):
            check_number("problem", field.name, getattr(problem, field.name), whole=True)


def _check_references(problem: Problem) -> None:
    count = len(problem.tensors)
    for op in problem.forward + problem.backward:
        for t in (*op.inputs, *op.outputs):
            if not isinstance(t, int) or not 0 <= t < count:
                raise ProblemError(f"op {op.name!r} names tensor {t!r}, but there are {count}")


def _check_order(problem: Problem) -> None:
    written: set[int] = set()
    for op in problem.forward + problem.backward:
        for t in op.inputs:
            if t not in written:
                raise ProblemError(_read_too_early(problem, op, t))
        for t in op.outputs:
            if t in written:
                raise ProblemError(f"tensor {problem.tensors[t].name!r} is written twice")
            written.add(t)
    for what in ("outputs", "mutations", "gradients"):
        for t in getattr(problem, what):
            if t not in written:
                raise ProblemError(f"{what} names tensor {t!r}, which no op writes")


def _read_too_early(problem: Problem, op: Op, t: int) -> str:
    """Says why ``op`` cannot read t at its place: a cycle, an order in which t comes later, or no writer."""
    read = f"op {op.name!r} reads {problem.tensors[t].name!r} before any op writes it"
    ops = {FORWARD: problem.forward, BACKWARD: problem.backward}
    cycle = [ops[kind][i].name for kind, i in find_cycle(problem.dependencies)]
    if cycle:
        return f"{read}: these ops depend on each other in a cycle: {' -> '.join([*cycle, cycle[0]])}"
    makers = [other.name for other in problem.forward + problem.backward if t in other.outputs]
    return f"{read}: {makers[0]!r}, which makes it, must come first" if makers else f"{read}: no op makes it"


def _check_fusions(problem: Problem) -> None:
    readers: dict[int, int] = {}
    for op in problem.forward + problem.backward:
        for t in dict.fromkeys(op.inputs):
            readers[t] = readers.get(t, 0) + 1
    for op in problem.backward:
        if op.fusion is None:
            continue
        if not 0 <= op.fusion.op < len(problem.forward):
            raise ProblemError(f"op {op.name!r} is fused with forward op {op.fusion.op}, which there is not")
        mask = problem.forward[op.fusion.op]
        if op.fusion.op not in problem.deferrable or len(mask.outputs) != 1:
            raise ProblemError(f"op {op.name!r} is fused with {mask.name!r}, which does not just make a mask for it")
        if any(t not in op.inputs or readers[t] > 1 for t in mask.outputs):
            raise ProblemError(f"op {op.name!r} is fused with {mask.name!r}, but is not the only one to read its mask")


def without_codecs(problem: Problem) -> Problem:
    """Returns the problem in which tensors are saved or recomputed."""
    return replace(problem, tensors=tuple(replace(t, codecs=()) for t in problem.tensors))


def without_recomputation(problem: Problem) -> Problem:
    """Returns the problem in which no op runs twice; those that only serve the backward pass may still wait for it."""
    once = tuple(
        op if i in problem.deferrable else replace(op, recomputable=False) for i, op in enumerate(problem.forward)
    )
    return replace(problem, forward=once)


def single_techniques(problem: Problem) -> tuple[Problem, ...]:
    """Returns the problems of recomputing only and of compressing only; nothing where ``problem`` offers no codecs."""
    if not any(t.codecs for t in problem.tensors):
        return ()
    return without_codecs(problem), without_recomputation(problem)
