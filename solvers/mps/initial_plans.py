"""Initial plans with small peaks, from which the search climbs back up.

Greedy steps from the save-all plan get stuck where several peaks must fall together; these plans start beyond. Coarse
plans recompute the ops that make most bytes per second. Segment plans keep only what crosses the borders of equal
segments of the forward pass, as Chen et al. do (arXiv:1604.06174). Either kind stores the rest as small as the error
limit allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxhybrid.solvers.mps.neighbourhood import Neighbourhood
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, SAVED, Codes

SPEEDS = (0.0, 0.5, 0.9)  # quantiles of the bytes made per second, from which on ops are recomputed
SEGMENT_LENGTHS = (0.5, 1.0, 2.0, 4.0)  # relative to the square root of the number of forward ops
ERROR_ROUNDING = 1e-9  # relative: kept free below the squared error limit for sums of rounded terms


def coarse_plans(neighbourhood: Neighbourhood, max_error: float) -> Iterator[Codes]:
    """Yields plans that recompute the fastest ops, from none to all."""
    tables = neighbourhood.tables
    free = [t for t in neighbourhood.codes if neighbourhood.may_recompute(t)]
    speeds = sorted(_bytes_per_s(neighbourhood, t) for t in free)
    limits = sorted({speeds[int(q * (len(speeds) - 1))] for q in SPEEDS} if speeds else set(), reverse=True)
    for limit, defer in ((math.inf, True), *((limit, False) for limit in (math.inf, *limits))):
        recomputed = {
            t for t in free if (_bytes_per_s(neighbourhood, t) >= limit if tables.default_codes[t] == SAVED else defer)
        }
        yield from _stored_small(neighbourhood, recomputed, max_error)


def segment_plans(neighbourhood: Neighbourhood, max_error: float) -> Iterator[Codes]:
    """Yields plans that keep what crosses the borders of segments, and recompute the rest."""
    for factor in SEGMENT_LENGTHS:
        yield from _stored_small(neighbourhood, _within_segments(neighbourhood, factor), max_error)


def _within_segments(neighbourhood: Neighbourhood, factor: float) -> set[int]:
    """Returns the tensors that no later segment reads."""
    problem, producer = neighbourhood.tables.problem, neighbourhood.tables.producer
    length = max(round(factor * math.sqrt(len(problem.forward))), 1)
    crossing = {t for i, op in enumerate(problem.forward) for t in op.inputs if producer[t] // length < i // length}
    return {t for t in neighbourhood.codes if neighbourhood.may_recompute(t) and t not in crossing}


def _bytes_per_s(neighbourhood: Neighbourhood, t: int) -> float:
    tables = neighbourhood.tables
    return float(tables.size_bytes[t]) / max(tables.problem.forward[tables.producer[t]].seconds, 1e-12)


def _stored_small(neighbourhood: Neighbourhood, recomputed: set[int], max_error: float) -> Iterator[Codes]:
    """Yields the plan that stores all but ``recomputed`` exactly, and the one that stores some of it lossy."""
    tables, state = neighbourhood.tables, neighbourhood.state
    codes = list(tables.default_codes)
    for t in neighbourhood.codes:
        if t not in tables.held:
            codes[t] = RECOMPUTED if t in recomputed else neighbourhood.lossless_code[t]
    yield codes.copy()
    if state.evaluate(bytes(codes)) is not None:
        _turn_lossy(neighbourhood, codes, max_error)
        yield codes


def _turn_lossy(neighbourhood: Neighbourhood, codes: Codes, max_error: float) -> None:
    """Lets stored tensors become lossy, most bytes per squared error first, while the error limit lasts."""
    stored_bytes = neighbourhood.stored_bytes
    worth: list[tuple[float, int, int]] = []
    for t, code in _lossy_choices(neighbourhood, codes):
        freed = stored_bytes(t, codes[t]) - stored_bytes(t, code)
        worth.append((freed / max(neighbourhood.error2(t, code), 1e-18), t, code))
    spent = 0.0
    for _, t, code in sorted(worth, reverse=True):
        old, new = neighbourhood.error2(t, codes[t]), neighbourhood.error2(t, code)
        smaller = stored_bytes(t, code) < stored_bytes(t, codes[t])
        if smaller and spent - old + new <= max_error**2 * (1 - ERROR_ROUNDING):
            spent += new - old
            codes[t] = code


def _lossy_choices(neighbourhood: Neighbourhood, codes: Codes) -> Iterator[tuple[int, int]]:
    """Yields lossy codes of stored tensors that nothing is recomputed from."""
    tables, use = neighbourhood.tables, neighbourhood.state.use
    exact = {
        s
        for t, code in enumerate(codes)
        if code == RECOMPUTED and use[t] < NEVER
        for s in tables.read[tables.producer[t]]
    }
    for t, offered in neighbourhood.codes.items():
        if use[t] == NEVER or t in exact or t in tables.held or codes[t] == RECOMPUTED:
            continue
        for code in offered:
            if code >= FIRST_CODEC and tables.is_lossy[t][code]:
                yield t, code
