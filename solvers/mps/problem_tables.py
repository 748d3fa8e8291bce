"""The fixed grid of slots and the tables of a problem that do not depend on the plan.

There is one slot per forward op, one for the program point between the passes, and one per backward op. A state is one
code per tensor: 0 save, 1 recompute, 2 + j the tensor's j-th codec option.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import fused_op

State = list[int]
Ints = npt.NDArray[np.int64]
SAVED, RECOMPUTED = 0, 1
FIRST_CODEC = 2
NEVER = 1 << 60


class Grid:
    """What every measurement of one problem needs, worked out once.

    Attributes:
        read, made: per forward op, the tensors read and made.
        touched: per forward op, both.
        sources: per forward op, the ops that make what it reads.
        readers: per tensor, the forward ops that read it.
        producer: per tensor, the forward op that makes it, or -1.
        first_run: per tensor, the first backward op that reads it, or NEVER.
        base_read: per tensor, slot of the last use by a forward op that every plan runs, or -1.
        base_last: per tensor, twice the slot of the last backward op that reads it, and one more, or -1.
        optional: forward ops that some plans leave out, with the height of each while it runs.
        optional_users: per tensor, those of them that read or make it.
        fused_at: per fusable mask op, the slot of its reader; ``fused_top`` is the reader's height when fused.
        base_live: bytes of what no plan decides, and of all that forward ops have made that every plan runs.
        base_top: how high each op reaches above what is alive.
        rerun_top: per forward op, how high it reaches above what is alive.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.n_forward = len(problem.forward)
        self.n_ops = self.n_forward + len(problem.backward)
        self.n_slots = self.n_ops + 1
        count = len(problem.tensors)
        self.producer = [problem.producer.get(t, -1) for t in range(count)]
        self.sizes = [t.size_bytes for t in problem.tensors]
        self.held, self.mutated = frozenset(problem.outputs), frozenset(problem.mutations)
        self.gradients = frozenset(problem.gradients)
        self.default: State = [
            RECOMPUTED if o in problem.deferrable and t not in self.held else SAVED for t, o in enumerate(self.producer)
        ]
        self.lossy_options = [tuple(not o.lossless for o in t.codecs) for t in problem.tensors]
        self.base_top = np.zeros(self.n_slots, np.int64)
        self.base_live = np.full(self.n_slots, problem.resident_bytes, np.int64)
        self._prepare_forward(count)
        self._prepare_backward(count)
        self._known_around: dict[tuple[int, int], tuple[int, ...]] = {}

    def slot(self, backward_op: int) -> int:
        """The slot of a backward op."""
        return self.n_forward + 1 + backward_op

    def lossy(self, t: int, code: int) -> bool:
        """Whether ``code`` gives back other bits."""
        return code >= FIRST_CODEC and self.lossy_options[t][code - FIRST_CODEC]

    def _prepare_forward(self, count: int) -> None:
        problem = self.problem
        self.read = [op.inputs for op in problem.forward]
        self.made = [op.outputs for op in problem.forward]
        self.touched = [op.inputs + op.outputs for op in problem.forward]
        self.sources = [tuple({self.producer[t] for t in op.inputs}) for op in problem.forward]
        self.readers: list[list[int]] = [[] for _ in range(count)]
        for i, op in enumerate(problem.forward):
            for t in dict.fromkeys(op.inputs):
                self.readers[t].append(i)
        self.rerun_top = [problem.top_bytes(op) for op in problem.forward]
        required = problem.required_forward_ops()
        self.optional: dict[int, int] = {}
        self.base_read = [-1] * count
        self.base_s = sum(op.seconds for op in problem.backward) - problem.step_s
        for i, op in reversed(list(enumerate(problem.forward))):
            if i not in required:
                self.optional[i] = self.rerun_top[i]
                continue
            self.base_s += op.seconds
            self.base_top[i] = self.rerun_top[i]
            self.base_live[i + 1 :] += sum(self.sizes[t] for t in op.outputs)
            for t in (*op.inputs, *op.outputs):
                self.base_read[t] = max(self.base_read[t], i)
        self.optional_users = [
            tuple(o for o in (self.producer[t], *self.readers[t]) if o in self.optional) for t in range(count)
        ]

    def _prepare_backward(self, count: int) -> None:
        problem = self.problem
        self.first_run, self.base_last = [NEVER] * count, [-1] * count
        death = [0] * count
        self.fused_at: dict[int, int] = {}
        self.fused_top: dict[int, int] = {}
        self.base_live[self.n_forward + 1 :] += problem.tangent_bytes
        for p, op in enumerate(problem.backward):
            self.base_top[self.slot(p)] = problem.top_bytes(op)
            for t in (*op.inputs, *op.outputs):
                death[t] = p
                self.base_last[t] = 2 * self.slot(p) + 1
            for t in op.inputs:
                self.first_run[t] = min(self.first_run[t], p)
            if op.fusion:
                self.fused_at[op.fusion.op] = self.slot(p)
                self.fused_top[op.fusion.op] = problem.top_bytes(fused_op(problem, op, op.fusion))
        for p, op in enumerate(problem.backward):
            for t in op.outputs:
                end = self.n_slots if t in self.gradients else self.slot(death[t]) + 1
                self.base_live[self.slot(p) + 1 : end] += self.sizes[t]

    def near(self, tensors: Iterable[int], steps: int = 2) -> set[int]:
        """``tensors`` and those up to ``steps`` steps away along sources and readers."""
        return set().union(*(self._around(t, steps) for t in tensors))

    def _around(self, t: int, steps: int) -> tuple[int, ...]:
        known = self._known_around.get((t, steps))
        if known is None:
            found = edge = {t}
            for _ in range(steps):
                step: set[int] = set()
                for u in edge:
                    step.update(self.read[self.producer[u]])
                    for i in self.readers[u][:8]:
                        step.update(self.made[i])
                edge = step - found
                found = found | edge
            known = self._known_around[t, steps] = tuple(found)
        return known
