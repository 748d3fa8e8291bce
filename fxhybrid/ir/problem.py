"""The planning problem: plain numbers, no torch.

A training step is two straight-line programs, forward and backward, over storages. Every storage that the
forward program makes and the backward program wants is a decision: keep it, keep an encoded form of it, or
run its op again. Parameters, buffers and inputs are resident: always there, never decided, summed up in
``resident_bytes``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fxhybrid.errors import ProblemError

MAX_TENSORS = 200_000  # a planner would work for hours on more, and no traced step comes near


@dataclass(frozen=True)
class CodecOption:
    """One encoded form that a tensor may be kept in.

    Attributes:
        codec: the codec's text, understood by the runtime.
        encoded_bytes: what the encoded form occupies.
        encode_s: seconds to encode.
        decode_s: seconds to decode.
        encode_alloc_peak_bytes: the allocator's peak rise during encode, the encoded form included.
        decode_alloc_peak_bytes: the same for decode, the decoded tensor included.
        lossless: whether decode gives back the very same bits.
        error: relative error of the whole parameter gradient that this choice adds on its own.
    """

    codec: str
    encoded_bytes: int
    encode_s: float
    decode_s: float
    encode_alloc_peak_bytes: int
    decode_alloc_peak_bytes: int
    lossless: bool
    error: float = 0.0


@dataclass(frozen=True)
class Tensor:
    """A storage made during the step.

    Attributes:
        name: unique and derived from the graph's structure.
        size_bytes: what the allocator counts for it.
        codecs: encoded forms offered; lossy ones only where every backward reader tolerates them.
    """

    name: str
    size_bytes: int
    codecs: tuple[CodecOption, ...] = ()


@dataclass(frozen=True)
class Fusion:
    """A backward op's other form: one operator that reads the sources of a mask instead of the mask.

    It is taken where the mask is not kept. ``Op.seconds`` of the mask's own op is then what keeping the mask
    costs beyond this form.

    Attributes:
        op: forward op that makes the mask.
        alloc_peak_bytes: the allocator's peak rise while the fused operator runs.
    """

    op: int
    alloc_peak_bytes: int


@dataclass(frozen=True)
class Op:
    """One operator call; views are folded into their readers.

    Attributes:
        name: unique name.
        inputs: indices of the tensors read (resident ones left out).
        outputs: indices of the tensors made.
        seconds: time of one run.
        alloc_peak_bytes: the allocator's peak rise while it runs, its outputs included.
        recomputable: False for random ops and ops that read what the step overwrites.
        pinned: runs in the forward pass even if nothing reads it (random ops, so that the generator's
            state after the step is that of plain eager).
        fusion: for a backward op that applies a mask which nothing else reads.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    alloc_peak_bytes: int
    recomputable: bool = True
    pinned: bool = False
    fusion: Fusion | None = None


@dataclass(frozen=True)
class Problem:
    """A training step as numbers.

    Attributes:
        tensors: all storages, made by forward or backward.
        forward: forward ops in the order in which they run.
        backward: backward ops in the order in which they run.
        outputs: tensors that the caller holds from the end of forward to the end of backward.
        mutations: tensors that live to the end of forward, where they are copied into buffers.
        gradients: tensors that live to the end of backward.
        resident_bytes: parameters, buffers, inputs, optimizer state and reserve.
        tangent_bytes: gradients of the outputs, alive through the whole backward pass.
    """

    tensors: tuple[Tensor, ...]
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    outputs: tuple[int, ...]
    mutations: tuple[int, ...]
    gradients: tuple[int, ...]
    resident_bytes: int
    tangent_bytes: int = 0

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
    def deferrable(self) -> frozenset[int]:
        """Forward ops that only serve the backward pass (masks, offsets): running them there instead is free."""
        wanted = set(self.outputs) | set(self.mutations)
        deferrable: set[int] = set()
        for i in range(len(self.forward) - 1, -1, -1):
            op = self.forward[i]
            if op.pinned or not wanted.isdisjoint(op.outputs):
                wanted.update(op.inputs)
            elif op.recomputable:
                deferrable.add(i)
        return frozenset(deferrable)

    @cached_property
    def fused_masks(self) -> frozenset[int]:
        """Forward ops that make a mask which, unless kept, its reader does without."""
        return frozenset(op.fusion.op for op in self.backward if op.fusion)

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """Forward tensors on which a decision can matter: read by backward directly or through a chain."""
        seen = dict.fromkeys(self.backward_reads)
        stack = list(seen)
        while stack:
            op = self.forward[self.producer[stack.pop()]]
            for t in op.inputs if op.recomputable else ():
                if t not in seen:
                    seen[t] = None
                    stack.append(t)
        held = set(self.outputs)
        return tuple(sorted(t for t in seen if t not in held))

    @cached_property
    def step_s(self) -> float:
        """Seconds of one step that keeps everything; masks are fused into their readers then."""
        ops = [op for i, op in enumerate(self.forward) if i not in self.fused_masks]
        return math.fsum(op.seconds for op in [*ops, *self.backward])

    def top_bytes(self, op: Op) -> int:
        """How far memory rises above what was alive while ``op`` runs."""
        return max(op.alloc_peak_bytes, sum(self.tensors[t].size_bytes for t in op.outputs))

    def __str__(self) -> str:
        return (
            f"Problem: {len(self.forward)} forward and {len(self.backward)} backward ops, "
            f"{len(self.tensors)} tensors, {len(self.candidates)} candidates, step {self.step_s * 1e3:.1f} ms"
        )

    def to_json(self) -> str:
        """This problem as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The problem that ``to_json`` wrote, checked.

        Raises:
            ProblemError: the text is no problem, or a malformed one.
        """
        try:
            raw = json.loads(text)
            problem = cls(
                tensors=tuple(_tensor(t) for t in raw["tensors"]),
                forward=tuple(_op(o) for o in raw["forward"]),
                backward=tuple(_op(o) for o in raw["backward"]),
                outputs=tuple(raw["outputs"]),
                mutations=tuple(raw["mutations"]),
                gradients=tuple(raw["gradients"]),
                resident_bytes=raw["resident_bytes"],
                tangent_bytes=raw["tangent_bytes"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProblemError(f"not a problem in JSON form: {error!r}") from error
        check_problem(problem)
        return problem


def _tensor(raw: dict[str, Any]) -> Tensor:
    return Tensor(raw["name"], raw["size_bytes"], tuple(CodecOption(**c) for c in raw["codecs"]))


def _op(raw: dict[str, Any]) -> Op:
    fusion = Fusion(**raw["fusion"]) if raw.get("fusion") else None
    return Op(**{**raw, "inputs": tuple(raw["inputs"]), "outputs": tuple(raw["outputs"]), "fusion": fusion})


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
    written: set[int] = set()
    for op in problem.forward + problem.backward:
        for t in (*op.inputs, *op.outputs):
            if not isinstance(t, int) or not 0 <= t < count:
                raise ProblemError(f"op {op.name!r} names tensor {t!r}, but there are {count}")
        for t in op.inputs:
            if t not in written:
                name = problem.tensors[t].name
                raise ProblemError(f"op {op.name!r} reads {name!r} before any op writes it (a cycle?)")
        for t in op.outputs:
            if t in written:
                raise ProblemError(f"tensor {problem.tensors[t].name!r} is written twice")
            written.add(t)
    for what in ("outputs", "mutations", "gradients"):
        for t in getattr(problem, what):
            if t not in written:
                raise ProblemError(f"{what} names tensor {t!r}, which no op writes")
    _check_fusions(problem)


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


def _check_numbers(problem: Problem) -> None:
    def check(owner: str, field: str, value: object, whole: bool) -> None:
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value < 0:
            raise ProblemError(f"{owner}: {field} is {value!r}; it must be a finite number of at least 0")

    for tensor in problem.tensors:
        check(f"tensor {tensor.name!r}", "size_bytes", tensor.size_bytes, True)
        for option in tensor.codecs:
            owner = f"codec {option.codec!r} of tensor {tensor.name!r}"
            for field in ("encoded_bytes", "encode_alloc_peak_bytes", "decode_alloc_peak_bytes"):
                check(owner, field, getattr(option, field), True)
            for field in ("encode_s", "decode_s", "error"):
                check(owner, field, getattr(option, field), False)
    for op in problem.forward + problem.backward:
        if op.fusion:
            check(f"op {op.name!r}", "fusion's rise_bytes", op.fusion.alloc_peak_bytes, True)
        check(f"op {op.name!r}", "seconds", op.seconds, False)
        check(f"op {op.name!r}", "alloc_peak_bytes", op.alloc_peak_bytes, True)
    check("problem", "resident_bytes", problem.resident_bytes, True)
    check("problem", "tangent_bytes", problem.tangent_bytes, True)


def without_codecs(problem: Problem) -> Problem:
    """The problem where tensors are kept as they are or made again."""
    return replace(problem, tensors=tuple(replace(t, codecs=()) for t in problem.tensors))


def without_recomputation(problem: Problem) -> Problem:
    """The problem where no op runs twice; those that only serve the backward pass may still wait for it."""
    once = tuple(
        op if i in problem.deferrable else replace(op, recomputable=False) for i, op in enumerate(problem.forward)
    )
    return replace(problem, forward=once)


def single_techniques(problem: Problem) -> tuple[Problem, ...]:
    """Recomputing only and compressing only; nothing where ``problem`` offers no codecs."""
    if not any(t.codecs for t in problem.tensors):
        return ()
    return without_codecs(problem), without_recomputation(problem)
