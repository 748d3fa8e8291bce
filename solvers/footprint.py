"""The heights of a plan, kept up to date as the plan changes.

``Footprints`` stands at one state at a time. Moving to another state settles only what differs: who is needed
from when, who lives from where to where, and the few slots whose decodings and recomputations change. Its peak
and added time are exactly those of ``lower`` + ``simulate``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.grid import FIRST_CODEC, NEVER, RECOMPUTED, Ints, State
from fxhybrid.solvers.settling import Settling


@dataclass(frozen=True)
class Footprint:
    """What one state costs.

    Attributes:
        peak_bytes: highest point of the step.
        added_s: seconds beyond running every op once.
        error2: sum of squared lossy errors.
    """

    peak_bytes: int
    added_s: float
    error2: float


class Footprints(Settling):
    """Measures states of one problem, each by what differs from the one before.

    Attributes:
        moves: how many have been made so far.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._default = bytes(self.default)
        self._named: dict[int, list[Action]] = {
            t: [SAVE, RECOMPUTE, *(Compress(o.codec) for o in problem.tensors[t].codecs)] for t in problem.candidates
        }
        self.moves = 0
        self._settle(range(self.n_forward), set(problem.producer))

    # -- what the present state costs ----------------------------------------------------------------------

    @property
    def valid(self) -> bool:
        """Whether every recomputation is allowed and reads exact tensors."""
        return self._invalid == 0

    def heights(self) -> Ints:
        """Bytes per slot of the grid, the highest within the slot."""
        if self._heights is None:
            self._heights = self._live + np.maximum(self._top, self._group)
        return self._heights

    def footprint(self) -> Footprint:
        """The figures of the present state."""
        peak = int(self.heights().max()) if self.n_ops else self.problem.resident_bytes
        return Footprint(peak, self.added_s, self.error2)

    @property
    def added_s(self) -> float:
        """Seconds beyond running every op once; what rounding leaves of nothing is nothing."""
        return self._seconds if self._seconds > 1e-12 * self.problem.step_s else 0.0

    def exact_added_s(self) -> float:
        """``added_s`` summed up from nothing, to the last bit as the simulator has it."""
        forward = self.problem.forward
        seconds = [op.seconds for op in self.problem.backward]
        seconds += [op.seconds for op, runs in zip(forward, self._runs, strict=True) if runs]
        seconds += [forward[o].seconds for o, at in enumerate(self.rerun) if at < NEVER and o not in self.fused_at]
        for t in np.flatnonzero(np.frombuffer(bytes(self.state), np.uint8) >= FIRST_CODEC).tolist():
            if self.use[t] < NEVER:
                option = self.option(t, self.state[t])
                seconds += [option.encode_s, option.decode_s]
        return max(math.fsum(seconds) - self.problem.step_s, 0.0)

    @property
    def error2(self) -> float:
        """Sum of squared lossy errors."""
        return max(self._error2, 0.0) if self._lossy else 0.0

    def measure(self, state: State) -> Footprint | None:
        """Moves to ``state``; its footprint, or None if an op would be recomputed from a lossy tensor."""
        self.move(self.changes_to(bytes(state)))
        return self.footprint() if self.valid else None

    def actions(self) -> dict[int, Action]:
        """The state as actions; defaults and what backward does not want are left out."""
        state, use, named = self.state, self.use, self._named
        return {t: named[t][state[t]] for t in self.changes_to(self._default) if t in named and use[t] < NEVER}

    def codes(self, actions: Actions) -> bytes | None:
        """The state in which ``actions`` are taken, and the default where they name nothing; None if there is none.

        Plans from elsewhere may hold what no state stands for: tensors made again more than once.
        """
        state = self.default.copy()
        for t, action in actions.items():
            if action not in self._named.get(t, ()):
                return None
            state[t] = self._named[t].index(action)
        return bytes(state)

    def changes_to(self, codes: bytes) -> dict[int, int]:
        """What differs in another state, with its codes."""
        there, here = np.frombuffer(codes, np.uint8), np.frombuffer(bytes(self.state), np.uint8)
        changed: list[int] = np.flatnonzero(there != here).tolist()
        return {t: codes[t] for t in changed}

    # -- moving to another state ---------------------------------------------------------------------------

    def effect(self, changes: Mapping[int, int]) -> tuple[dict[int, int], float, float] | None:
        """What a move would do: bytes that come or go from a slot on, added seconds and squared error.

        None if it is invalid.
        """
        if len(changes) == 1:
            ((t, code),) = changes.items()
            if RECOMPUTED not in (code, self.state[t]) and self.use[t] < NEVER:
                return self._swap(t, code)
        seconds, error2 = self._seconds, self._error2
        self._trying = True
        self.move(changes)
        found = (self._steps, self._seconds - seconds, self._error2 - error2) if self.valid else None
        self.undo()
        self._trying = False
        return found

    def _swap(self, t: int, code: int) -> tuple[dict[int, int], float, float] | None:
        """``effect`` of storing ``t`` in another form: nothing else is needed earlier or later for it."""
        before = self.state[t]
        lossy = self.lossy(t, code) - self.lossy(t, before)
        if self._invalid + lossy * sum(self.rerun[o] < NEVER for o in self.readers[t]):
            return None
        self.state[t] = code
        old, new = self._lives[t], self._life(t, *self._last_uses(t))
        self.state[t] = before
        steps = dict(new.steps)
        for at, size in old.steps:
            steps[at] = steps.get(at, 0) - size
        return steps, new.seconds - old.seconds, new.error2 - old.error2

    def move(self, changes: Mapping[int, int]) -> dict[int, int]:
        """Gives the tensors in ``changes`` new codes; returns the changes that lead back."""
        self.moves += 1
        self._begin()
        back = {t: self.state[t] for t, code in changes.items() if code != self.state[t]}
        for t, old in back.items():
            lossy = self.lossy(t, changes[t]) - self.lossy(t, old)
            if lossy:
                self._invalid += lossy * sum(self.rerun[o] < NEVER for o in self.readers[t])
            self._set(self.state, t, changes[t])
        self._settle({self.producer[t] for t in back}, set(back))
        return back
