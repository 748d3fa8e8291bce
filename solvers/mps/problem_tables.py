"""Tables of a problem that no plan changes; each is computed once, when first read.

Time is a line of slots: one per forward op, one for the program point between the passes, and one per backward op. What
happens between two ops (encodings after a forward op, decodings and reruns before a backward op) belongs to the slot of
the later one. A plan is one code per tensor: 0 save, 1 recompute, 2 + j the tensor's j-th codec option.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions, Compress
from fxhybrid.ir.problem import CodecOption, Problem
from fxhybrid.ir.schedule import fused_op

Codes = list[int]
Ints = npt.NDArray[np.int64]
SAVED, RECOMPUTED = 0, 1
FIRST_CODEC = 2
NEVER = 1 << 60
MAX_NEAR_READERS = 8  # of one tensor that count as near it; some are read by hundreds of ops


@dataclass(frozen=True, eq=False)
class ProblemTables:
    """Holds what every evaluation of one problem's plans needs.

    Attributes:
        problem: the step.
    """

    problem: Problem

    # -- tensors -------------------------------------------------------------------------------------------

    @cached_property
    def n_tensors(self) -> int:
        """Tensors of both passes."""
        return len(self.problem.tensors)

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """Per tensor, the forward op that makes it, or -1."""
        return tuple(self.problem.producer.get(t, -1) for t in range(self.n_tensors))

    @cached_property
    def size_bytes(self) -> tuple[int, ...]:
        """Per tensor, its bytes."""
        return tuple(t.size_bytes for t in self.problem.tensors)

    @cached_property
    def held(self) -> frozenset[int]:
        """Tensors that the caller holds to the end of the step."""
        return frozenset(self.problem.outputs)

    @cached_property
    def mutated(self) -> frozenset[int]:
        """Tensors that live to the end of the forward pass."""
        return frozenset(self.problem.mutations)

    @cached_property
    def gradients(self) -> frozenset[int]:
        """Tensors that live to the end of the backward pass."""
        return frozenset(self.problem.gradients)

    @cached_property
    def default_codes(self) -> tuple[int, ...]:
        """Per tensor, the code of what ``lower`` does with a tensor that a plan does not name."""
        deferrable = self.problem.deferrable
        return tuple(
            RECOMPUTED if o in deferrable and t not in self.held else SAVED for t, o in enumerate(self.producer)
        )

    @cached_property
    def is_lossy(self) -> tuple[tuple[bool, ...], ...]:
        """Per tensor and code, whether other bits come back."""
        return tuple((False, False, *(not o.lossless for o in t.codecs)) for t in self.problem.tensors)

    def option(self, t: int, code: int) -> CodecOption:
        """Returns the codec option that ``code`` stands for."""
        return self.problem.tensors[t].codecs[code - FIRST_CODEC]

    # -- forward pass --------------------------------------------------------------------------------------

    @cached_property
    def n_forward(self) -> int:
        """Forward ops."""
        return len(self.problem.forward)

    @cached_property
    def read(self) -> tuple[tuple[int, ...], ...]:
        """Per forward op, the tensors that it reads."""
        return tuple(op.inputs for op in self.problem.forward)

    @cached_property
    def made(self) -> tuple[tuple[int, ...], ...]:
        """Per forward op, the tensors that it makes."""
        return tuple(op.outputs for op in self.problem.forward)

    @cached_property
    def touched(self) -> tuple[tuple[int, ...], ...]:
        """Per forward op, the tensors that it reads or makes."""
        return tuple(op.inputs + op.outputs for op in self.problem.forward)

    @cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Per forward op, the ops that make what it reads."""
        return tuple(tuple({self.producer[t] for t in op.inputs}) for op in self.problem.forward)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Per tensor, the forward ops that read it."""
        readers: list[list[int]] = [[] for _ in range(self.n_tensors)]
        for i, op in enumerate(self.problem.forward):
            for t in dict.fromkeys(op.inputs):
                readers[t].append(i)
        return tuple(map(tuple, readers))

    @cached_property
    def op_top_bytes(self) -> tuple[int, ...]:
        """Per forward op, how high it reaches above what is alive."""
        return tuple(self.problem.top_bytes(op) for op in self.problem.forward)

    @cached_property
    def optional(self) -> frozenset[int]:
        """Forward ops that some plans leave out of the forward pass: they only serve the backward pass."""
        return frozenset(range(self.n_forward)) - self.problem.required_forward_ops()

    @cached_property
    def optional_users(self) -> tuple[tuple[int, ...], ...]:
        """Per tensor, the optional ops that make or read it."""
        return tuple(
            tuple(o for o in (self.producer[t], *self.readers[t]) if o in self.optional) for t in range(self.n_tensors)
        )

    @cached_property
    def base_read(self) -> tuple[int, ...]:
        """Per tensor, the last slot at which a forward op that every plan runs makes or reads it, or -1."""
        last = [-1] * self.n_tensors
        for i, touched in enumerate(self.touched):
            if i not in self.optional:
                for t in touched:
                    last[t] = i
        return tuple(last)

    # -- backward pass -------------------------------------------------------------------------------------

    @cached_property
    def n_slots(self) -> int:
        """One slot per op of either pass, and one between them."""
        return self.n_forward + 1 + len(self.problem.backward)

    def slot(self, backward_op: int) -> int:
        """Returns the slot of a backward op."""
        return self.n_forward + 1 + backward_op

    @cached_property
    def first_read(self) -> tuple[int, ...]:
        """Per tensor, the first backward op that reads it, or NEVER."""
        first = [NEVER] * self.n_tensors
        for p, op in enumerate(self.problem.backward):
            for t in op.inputs:
                first[t] = min(first[t], p)
        return tuple(first)

    @cached_property
    def base_last(self) -> tuple[int, ...]:
        """Per tensor, one more than twice the slot of the last backward op that reads or makes it, or -1."""
        last = [-1] * self.n_tensors
        for p, op in enumerate(self.problem.backward):
            for t in (*op.inputs, *op.outputs):
                last[t] = 2 * self.slot(p) + 1
        return tuple(last)

    @cached_property
    def fused_at(self) -> dict[int, int]:
        """Per forward op that makes a fusable mask, the slot of the mask's reader."""
        return {op.fusion.op: self.slot(p) for p, op in enumerate(self.problem.backward) if op.fusion}

    @cached_property
    def fused_top_bytes(self) -> dict[int, int]:
        """Per forward op that makes a fusable mask, how high the mask's reader reaches when it is fused."""
        problem = self.problem
        return {
            op.fusion.op: problem.top_bytes(fused_op(problem, op, op.fusion)) for op in problem.backward if op.fusion
        }

    # -- what no plan decides ------------------------------------------------------------------------------

    @cached_property
    def base_s(self) -> float:
        """Seconds of all ops that every plan runs, less those of the step."""
        seconds = sum(op.seconds for op in self.problem.backward) - self.problem.step_s
        for i in range(self.n_forward - 1, -1, -1):
            if i not in self.optional:
                seconds += self.problem.forward[i].seconds
        return seconds

    @cached_property
    def base_top(self) -> Ints:
        """Per slot, how high its op reaches above what is alive, where every plan runs it."""
        top = np.zeros(self.n_slots, np.int64)
        for i, top_bytes in enumerate(self.op_top_bytes):
            top[i] = 0 if i in self.optional else top_bytes
        for p, op in enumerate(self.problem.backward):
            top[self.slot(p)] = self.problem.top_bytes(op)
        return _constant(top)

    @cached_property
    def base_live(self) -> Ints:
        """Per slot, bytes of what no plan decides, and of all outputs so far of forward ops that every plan runs."""
        live = np.full(self.n_slots, self.problem.forward_base_bytes, np.int64)
        live[self.n_forward + 1 :] = self.problem.backward_base_bytes
        for i, made in enumerate(self.made):
            if i not in self.optional:
                live[i + 1 :] += sum(self.size_bytes[t] for t in made)
        for p, op in enumerate(self.problem.backward):
            for t in op.outputs:
                end = self.n_slots if t in self.gradients else self.base_last[t] // 2 + 1
                live[self.slot(p) + 1 : end] += self.size_bytes[t]
        return _constant(live)

    # -- actions and neighbours ----------------------------------------------------------------------------

    @cached_property
    def actions(self) -> dict[int, tuple[Action, ...]]:
        """Per candidate tensor, the action that each code stands for."""
        tensors = self.problem.tensors
        return {t: (SAVE, RECOMPUTE, *(Compress(o.codec) for o in tensors[t].codecs)) for t in self.problem.candidates}

    def codes_of(self, actions: Actions) -> bytes | None:
        """Returns the codes of a plan, the default where it names nothing; None if it holds what no code stands for.

        Plans from elsewhere may name tensors that are no candidates, or codecs that are not offered here.
        """
        codes = list(self.default_codes)
        for t, action in actions.items():
            if action not in self.actions.get(t, ()):
                return None
            codes[t] = self.actions[t].index(action)
        return bytes(codes)

    def near(self, tensors: Iterable[int], steps: int = 2) -> set[int]:
        """Returns ``tensors`` and those up to ``steps`` steps away along sources and readers."""
        return set().union(*(self._near_one(t, steps) for t in tensors))

    @cached_property
    def _known_near(self) -> dict[tuple[int, int], tuple[int, ...]]:
        return {}

    def _near_one(self, t: int, steps: int) -> tuple[int, ...]:
        known = self._known_near.get((t, steps))
        if known is None:
            found = edge = {t}
            for _ in range(steps):
                step: set[int] = set()
                for u in edge:
                    step.update(self.read[self.producer[u]])
                    for i in self.readers[u][:MAX_NEAR_READERS]:
                        step.update(self.made[i])
                edge = step - found
                found = found | edge
            known = self._known_near[t, steps] = tuple(found)
        return known


def _constant(values: Ints) -> Ints:
    values.setflags(write=False)
    return values
