"""The fixed grid of slots and the tables of a problem that do not depend on the plan.

There is one slot per op, forward then backward. A state is one code per tensor: 0 save, 1 recompute, 2 + j
the tensor's j-th codec option.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxhybrid.problem import Problem

State = list[int]
Ints = npt.NDArray[np.int64]
SAVED, RECOMPUTED = 0, 1
FIRST_CODEC = 2


class Grid:
    """What every measurement of one problem needs, worked out once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.n_forward = len(problem.forward)
        self.n_slots = self.n_forward + len(problem.backward)
        count = len(problem.tensors)
        self.producer = [problem.producer.get(t, -1) for t in range(count)]
        self.size = np.fromiter((t.size_bytes for t in problem.tensors), np.int64, count)
        self.held = set(problem.outputs)
        self.gradients = set(problem.gradients)
        self.default: State = [
            RECOMPUTED if o in problem.deferrable and t not in self.held else SAVED for t, o in enumerate(self.producer)
        ]
        self._prepare_forward(count)
        self._prepare_backward(count)

    def _prepare_forward(self, count: int) -> None:
        problem = self.problem
        wanted = {*problem.outputs, *problem.mutations, *problem.gradients}
        self.optional: list[int] = []
        self.base_read = [-1] * count
        self.base_s = sum(op.seconds for op in problem.backward) - problem.step_s
        for i in range(self.n_forward - 1, -1, -1):
            op = problem.forward[i]
            if not op.pinned and wanted.isdisjoint(op.outputs):
                self.optional.append(i)
                continue
            wanted.update(op.inputs)
            self.base_s += op.seconds
            for t in (*op.inputs, *op.outputs):
                self.base_read[t] = max(self.base_read[t], i)
        self.forward_tensors = np.array([t for op in problem.forward for t in op.outputs], np.int64)
        self.made_by = np.array([i for i, op in enumerate(problem.forward) for _ in op.outputs], np.int64)
        self.forward_rise = np.array([op.rise_bytes for op in problem.forward], np.int64)

    def _prepare_backward(self, count: int) -> None:
        problem = self.problem
        first_run, last_run = [-1] * count, [-1] * count
        death = [0] * count
        for p, op in enumerate(problem.backward):
            for t in (*op.inputs, *op.outputs):
                death[t] = p
            for t in op.inputs:
                if self.producer[t] >= 0:
                    last_run[t] = p
                    if first_run[t] < 0:
                        first_run[t] = p
        self.first_run, self.last_run = np.array(first_run, np.int64), np.array(last_run, np.int64)
        made = [(p, t) for p, op in enumerate(problem.backward) for t in op.outputs]
        n_backward = len(problem.backward)
        self.back_birth = np.array([p for p, _ in made], np.int64)
        self.back_death = np.array([n_backward if t in self.gradients else death[t] for _, t in made], np.int64)
        self.back_size = self.size[[t for _, t in made]] if made else np.zeros(0, np.int64)
        self.back_rise = np.array([op.rise_bytes for op in problem.backward], np.int64)
        self.roots = sorted(problem.backward_reads, key=lambda t: problem.backward_reads[t])
