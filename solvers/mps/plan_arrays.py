"""A plan as arrays: the code of each tensor, and what follows from the codes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from fxhybrid.solvers.mps.live_ranges import EMPTY, LiveRange
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, Codes, ProblemTables


@dataclass
class PlanArrays:
    """Holds a plan's codes and what follows from them; ``PlanState`` changes the values in place.

    Attributes:
        codes: per tensor, its code.
        use: per tensor, backward op before which it is first needed, or NEVER.
        last_use: per tensor, slot of its last backward use, or -1.
        ranges: per tensor, its live range.
        rerun: per forward op, backward op before which it runs again, or NEVER.
        runs: per forward op, whether it runs in the forward pass.
        members: per slot, the tensors that are encoded or decoded before its op, and ~o for an op o that runs again.
    """

    codes: Codes
    use: list[int]
    last_use: list[int]
    ranges: list[LiveRange]
    rerun: list[int]
    runs: list[bool]
    members: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def empty(cls, tables: ProblemTables) -> PlanArrays:
        """Returns the default codes before anything is derived from them."""
        n = tables.n_tensors
        runs = [i not in tables.optional for i in range(tables.n_forward)]
        codes, never = list(tables.default_codes), [NEVER] * n
        return cls(codes, never, [-1] * n, [EMPTY] * n, [NEVER] * tables.n_forward, runs)

    def is_kept(self, t: int) -> bool:
        """Whether ``t`` is stored in some form for the backward pass."""
        return self.use[t] < NEVER and self.codes[t] != RECOMPUTED


def exact_overhead_s(tables: ProblemTables, plan: PlanArrays) -> float:
    """Returns the seconds beyond running every op once, to the last bit as the simulator has them."""
    problem = tables.problem
    seconds = [op.seconds for op in problem.backward]
    seconds += [op.seconds for op, runs in zip(problem.forward, plan.runs, strict=True) if runs]
    again = (o for o, at in enumerate(plan.rerun) if at < NEVER and o not in tables.fused_at)
    seconds += [problem.forward[o].seconds for o in again]
    for t, code in enumerate(plan.codes):
        if code >= FIRST_CODEC and plan.use[t] < NEVER:
            option = tables.option(t, code)
            seconds += [option.encode_s, option.decode_s]
    return max(math.fsum(seconds) - problem.step_s, 0.0)
