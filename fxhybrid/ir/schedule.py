"""From actions to the exact order of work: the one place that knows what a plan means.

``lower`` turns a problem and one action per tensor into a straight list of instructions over values. The
timeline adds up this list and the rewrite pass emits it node by node, so that what is simulated is what runs.

* Encoding comes right after the last forward read; decoding and recomputation right before the first
  backward use; a value dies at its last use.
* Recomputation reads exact values only.
* An op whose results nobody needs does not run in the forward pass at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from fxhybrid.errors import PlanError
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions, Compress
from fxhybrid.ir.problem import CodecOption, Fusion, Op, Problem


class Kind(Enum):
    """Lists what an instruction can do."""

    RUN = "run"
    RERUN = "rerun"
    FUSED = "fused"
    FASTER = "faster"
    ENCODE = "encode"
    DECODE = "decode"


class Value(NamedTuple):  # thousands are made while plans are compared, four times as fast as frozen dataclasses
    """Describes one allocation: a tensor, an encoded form of it, or a second copy made in the backward pass."""

    tensor: int
    size_bytes: int
    encoded: bool = False


class Instruction(NamedTuple):
    """Describes one step of the schedule.

    Attributes:
        kind: what it does.
        op: index into ``Problem.forward`` (RERUN, forward RUN) or ``Problem.backward`` (backward RUN, FUSED, FASTER);
            for ENCODE and DECODE the tensor.
        codec: the codec's text for ENCODE and DECODE.
        reads: values read, by position in ``Schedule.values``.
        writes: values made.
        alloc_peak_bytes: the allocator's peak rise while it runs.
        seconds: its time.
    """

    kind: Kind
    op: int
    codec: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    alloc_peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """Holds the whole step in order.

    Attributes:
        values: every allocation.
        instructions: forward part, then backward part.
        n_forward: how many of them belong to the forward pass.
        stored: values that the backward pass takes over from the forward pass.
        overhead_s: seconds beyond running every op once.
        overwrites: positions of the instructions whose result takes over an argument's storage, with the argument's.
    """

    values: tuple[Value, ...]
    instructions: tuple[Instruction, ...]
    n_forward: int
    stored: tuple[int, ...]
    overhead_s: float
    overwrites: tuple[tuple[int, int], ...] = ()


def lower(problem: Problem, actions: Actions) -> Schedule:
    """Builds the schedule that carries out ``actions``.

    Tensors not named are saved, except those of ops that only serve the backward pass: these run there.

    Raises:
        PlanError: an action that the tensor does not offer, or a recomputation without exact sources.
    """
    return _Lowering(problem, actions).run()


class _MaskOp(Protocol):
    @property
    def inputs(self) -> tuple[int, ...]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...


def without_mask(inputs: tuple[int, ...], mask: _MaskOp) -> tuple[int, ...]:
    """Returns what an op's fused form reads: its own inputs, with the mask replaced by the mask's sources."""
    own = [t for t in inputs if t not in mask.outputs]
    return tuple(dict.fromkeys([*own, *mask.inputs]))


def fused_op(problem: Problem, op: Op, fusion: Fusion) -> Op:
    """Returns the form of a backward op that reads what its mask would be made from."""
    inputs = without_mask(op.inputs, problem.forward[fusion.op])
    return Op(op.name, inputs, op.outputs, op.seconds, fusion.alloc_peak_bytes)


class _Lowering:
    def __init__(self, problem: Problem, actions: Actions) -> None:
        self.problem = problem
        self.actions = actions
        self.values: list[Value] = []
        self.instructions: list[Instruction] = []
        self.held = frozenset(problem.outputs)
        self.stored = self._stored_tensors()
        self.current: dict[int, int] = {}  # tensor -> value that holds it now

    def action(self, t: int) -> Action:
        if t in self.held:
            return SAVE
        action = self.actions.get(t)
        if action is None:
            return RECOMPUTE if self.problem.producer[t] in self.problem.deferrable else SAVE
        return action

    def run(self) -> Schedule:
        encoded = self._forward()
        n_forward = len(self.instructions)
        stored = tuple(encoded.get(t, self.current[t]) for t in sorted(self.stored))
        self._backward(encoded)
        ran = math.fsum(i.seconds for i in self.instructions)
        overhead_s = max(ran - self.problem.step_s, 0.0)
        return Schedule(tuple(self.values), tuple(self.instructions), n_forward, stored, overhead_s)

    def _stored_tensors(self) -> frozenset[int]:
        """Returns the tensors that must outlive the forward pass, raw or encoded."""
        problem = self.problem
        stored: set[int] = set()
        seen: set[int] = set(problem.backward_reads)
        stack = list(seen)
        while stack:
            t = stack.pop()
            if self.action(t) is not RECOMPUTE:
                stored.add(t)
                continue
            op = problem.forward[problem.producer[t]]
            if not op.recomputable:
                raise PlanError(f"{problem.tensors[t].name!r} cannot be recomputed: {op.name!r} must run once")
            for source in op.inputs:
                self._check_exact(source, op)
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return frozenset(stored)

    def _check_exact(self, t: int, reader: Op) -> None:
        action = self.action(t)
        if isinstance(action, Compress) and not self._option(t, action.codec).lossless:
            name = self.problem.tensors[t].name
            raise PlanError(f"recomputing {reader.name!r} needs {name!r} exactly, but {action.codec} is lossy")

    def _option(self, t: int, codec: str) -> CodecOption:
        tensor = self.problem.tensors[t]
        for option in tensor.codecs:
            if option.codec == codec:
                return option
        offered = ", ".join(o.codec for o in tensor.codecs) or "none"
        raise PlanError(f"{tensor.name!r} does not offer codec {codec!r} (offered: {offered})")

    def _forward(self) -> dict[int, int]:
        """Emits the forward pass; returns the encoded value of each compressed tensor."""
        problem = self.problem
        required = problem.required_forward_ops(self.stored)
        encode_at: dict[int, list[int]] = {}
        last_read: dict[int, int] = {}
        for i, op in enumerate(problem.forward):
            if i in required:
                for t in (*op.outputs, *op.inputs):
                    last_read[t] = i
        for t in sorted(self.stored):
            if isinstance(self.action(t), Compress):
                encode_at.setdefault(last_read[t], []).append(t)
        encoded: dict[int, int] = {}
        for i, op in enumerate(problem.forward):
            if i in required:
                self._emit_op(Kind.RUN, i, op)
                for t in encode_at.get(i, ()):
                    encoded[t] = self._emit_encode(t)
        return encoded

    def _backward(self, encoded: dict[int, int]) -> None:
        available = {t for t in self.stored if t not in encoded}
        for position, op in enumerate(self.problem.backward):
            kind = Kind.RUN
            if op.fusion and not self.stored.intersection(self.problem.forward[op.fusion.op].outputs):
                kind, op = Kind.FUSED, fused_op(self.problem, op, op.fusion)
            missing = [t for t in op.inputs if t in self.problem.producer and t not in available]
            if missing:
                self._rematerialize(missing, available, encoded)
            self._emit_op(kind, position, op)

    def _rematerialize(self, missing: list[int], available: set[int], encoded: dict[int, int]) -> None:
        """Decodes and recomputes what the ``missing`` tensors take, in forward order."""
        problem = self.problem
        reruns: set[int] = set()
        decodes: set[int] = set()
        stack = list(missing)
        while stack:
            t = stack.pop()
            if t in available or t in decodes:
                continue
            if t in encoded:
                decodes.add(t)
            elif (producer := problem.producer[t]) not in reruns:
                reruns.add(producer)
                stack.extend(problem.forward[producer].inputs)
        order = sorted([(problem.producer[t], 1, t) for t in decodes] + [(i, 0, i) for i in reruns])
        # A decoded source comes right before the first rerun that reads it, not before all of them.
        pending = {t for _, is_decode, t in order if is_decode}
        for _, is_decode, i in order:
            if is_decode:
                continue
            op = problem.forward[i]
            for t in op.inputs:
                if t in pending:
                    pending.discard(t)
                    self._emit_decode(t, encoded[t])
            fresh = tuple(t for t in op.outputs if t not in available)
            self._emit_op(Kind.RERUN, i, op, keep=fresh)
            available.update(t for t in fresh if t not in encoded)
        for t in sorted(pending):
            self._emit_decode(t, encoded[t])
        available.update(decodes)

    def _emit_op(self, kind: Kind, index: int, op: Op, keep: tuple[int, ...] | None = None) -> None:
        reads = tuple(self.current[t] for t in op.inputs)
        writes = []
        for t in op.outputs:
            value = self._value(t, self.problem.tensors[t].size_bytes)
            writes.append(value)
            if keep is None or t in keep:
                self.current[t] = value
        self._append(kind, index, "", reads, tuple(writes), op.alloc_peak_bytes, op.seconds)

    def _emit_encode(self, t: int) -> int:
        action = self.action(t)
        assert isinstance(action, Compress)
        option = self._option(t, action.codec)
        value = self._value(t, option.encoded_bytes, encoded=True)
        reads = (self.current[t],)
        self._append(Kind.ENCODE, t, option.codec, reads, (value,), option.encode_alloc_peak_bytes, option.encode_s)
        return value

    def _emit_decode(self, t: int, source: int) -> None:
        action = self.action(t)
        assert isinstance(action, Compress)
        option = self._option(t, action.codec)
        value = self._value(t, self.problem.tensors[t].size_bytes)
        self.current[t] = value
        self._append(Kind.DECODE, t, option.codec, (source,), (value,), option.decode_alloc_peak_bytes, option.decode_s)

    def _value(self, tensor: int, size_bytes: int, encoded: bool = False) -> int:
        self.values.append(Value(tensor, size_bytes, encoded))
        return len(self.values) - 1

    def _append(
        self,
        kind: Kind,
        op: int,
        codec: str,
        reads: tuple[int, ...],
        writes: tuple[int, ...],
        alloc_peak_bytes: int,
        seconds: float,
    ) -> None:
        self.instructions.append(Instruction(kind, op, codec, reads, writes, alloc_peak_bytes, seconds))
