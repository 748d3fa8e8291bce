"""Coarse plans with small peaks, from which the search climbs back up.

Greedy steps from keep-everything get stuck where several peaks must fall together; these plans start beyond. Some
make again whole speed classes of ops and store the rest small; some keep only what crosses the borders of segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxhybrid.solvers.mps.neighbourhood import Choices
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, SAVED, State

SPEEDS = (0.0, 0.5, 0.9)  # quantiles of the speed from which ops are made again
SEGMENTS = (0.5, 1.0, 2.0, 4.0)  # lengths, relative to the root of the number of forward ops


def coarse_states(choices: Choices, max_error: float) -> Iterator[State]:
    """States that make the fastest ops again, from none to all, and store the rest as small as the error allows."""
    base = choices.base
    speeds = sorted(_speed(choices, t) for t in choices.codes if choices.may_recompute(t))
    limits = sorted({speeds[int(q * (len(speeds) - 1))] for q in SPEEDS} if speeds else set(), reverse=True)
    for limit, defer in ((math.inf, True), *((limit, False) for limit in (math.inf, *limits))):
        again = {
            t
            for t in choices.codes
            if choices.may_recompute(t) and (_speed(choices, t) >= limit if base.default[t] == SAVED else defer)
        }
        yield from _small(choices, again, max_error)


def segment_states(choices: Choices, max_error: float) -> Iterator[State]:
    """States that keep what crosses the borders of segments, and make the rest again."""
    for factor in SEGMENTS:
        yield from _small(choices, _within_segments(choices, factor), max_error)


def _within_segments(choices: Choices, factor: float) -> set[int]:
    """The tensors that no later segment reads; each segment is made again from what crosses its border."""
    problem = choices.base.problem
    length = max(round(factor * math.sqrt(len(problem.forward))), 1)
    crossing = {
        t for i, op in enumerate(problem.forward) for t in op.inputs if problem.producer[t] // length < i // length
    }
    return {t for t in choices.codes if choices.may_recompute(t) and t not in crossing}


def _speed(choices: Choices, t: int) -> float:
    """Bytes that recomputing the tensor's op makes per second."""
    op = choices.base.problem.forward[choices.base.producer[t]]
    return float(choices.base.sizes[t]) / max(op.seconds, 1e-12)


def _small(choices: Choices, again: set[int], max_error: float) -> Iterator[State]:
    """Recomputes ``again``; then of the rest, those that need not be exact become lossy while the error lasts."""
    base = choices.base
    state = base.default.copy()
    for t in choices.codes:
        if t not in base.held:
            state[t] = RECOMPUTED if t in again else choices.lossless[t]
    yield state.copy()
    if base.measure(state) is None:
        return
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
    yield state
