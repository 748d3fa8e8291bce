"""Coarse plans with small peaks, from which the search climbs back up.

Greedy steps from keep-everything get stuck where several peaks must fall together; these plans start beyond.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxhybrid.solvers.choices import Choices
from fxhybrid.solvers.grid import FIRST_CODEC, NEVER, RECOMPUTED, SAVED, State


def seed_states(choices: Choices, max_error: float) -> Iterator[State]:
    """States in which (nearly) every tensor is small, each family within the error limit."""
    base = choices.base
    speeds = sorted(_speed(choices, t) for t in choices.codes if choices.may_recompute(t))
    limits = sorted({speeds[int(q * (len(speeds) - 1))] for q in (0.0, 0.5, 0.9)} if speeds else set(), reverse=True)
    seen: list[State] = []
    for limit in (float("inf"), *limits):
        for defer in (True, False):
            for error in (max_error, 0.0):
                again = {
                    t
                    for t in choices.codes
                    if choices.may_recompute(t) and (_speed(choices, t) >= limit if base.default[t] == SAVED else defer)
                }
                state = _small(choices, again, error)
                if state not in seen:
                    seen.append(state)
                    yield state
    yield [SAVED] * len(base.default)


def _speed(choices: Choices, t: int) -> float:
    """Bytes that recomputing the tensor's op makes per second."""
    op = choices.base.problem.forward[choices.base.producer[t]]
    return float(choices.base.sizes[t]) / max(op.seconds, 1e-12)


def _small(choices: Choices, again: set[int], max_error: float) -> State:
    """Recomputes ``again``; of the rest, those that need not be exact become lossy while the error lasts."""
    base = choices.base
    state = base.default.copy()
    for t in choices.codes:
        if t in base.held:
            continue
        if t in again:
            state[t] = RECOMPUTED
        else:
            state[t] = choices.lossless[t]
    if base.measure(state) is None:
        return state
    exact = {
        s
        for t, code in enumerate(state)
        if code == RECOMPUTED and base.use[t] < NEVER
        for s in base.problem.forward[base.producer[t]].inputs
    }
    worth: list[tuple[float, int, int]] = []
    for t, codes in choices.codes.items():
        if base.use[t] == NEVER or t in exact or t in base.held or state[t] == RECOMPUTED:
            continue
        for code in codes:
            if code >= FIRST_CODEC and base.lossy(t, code):
                freed = choices.stored_bytes(t, state[t]) - choices.stored_bytes(t, code)
                worth.append((freed / max(choices.error2(t, code), 1e-18), t, code))
    spent = 0.0
    for _, t, code in sorted(worth, reverse=True):
        old = choices.error2(t, state[t])
        smaller = choices.stored_bytes(t, code) < choices.stored_bytes(t, state[t])
        if smaller and spent - old + choices.error2(t, code) <= max_error**2 * (1 - 1e-9):
            spent += choices.error2(t, code) - old
            state[t] = code
    return state
