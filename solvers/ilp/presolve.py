"""What the integer program knows about a problem before the first variable: who may be decided, and when.

Positions are those of backward ops. ``first`` and ``last`` are a tensor's direct backward reads; ``earliest``
and ``latest`` bound the position at which an op may run again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions
from fxhybrid.ir.problem import CodecOption, Problem
from fxhybrid.solvers.base import default_action

NEVER = 1 << 60


@dataclass(frozen=True)
class Facts:
    """Plain facts about one problem.

    Attributes:
        decided: candidates with variables, in order.
        options: codec options of each decided tensor that are worth offering.
        rerunnable: ops that may run again in backward.
        readers: for each tensor, the rerunnable ops that read it.
        unsure: what an op with a pruned output reads and makes: it may run earlier than the variables say.
        first: first direct backward read.
        last: last direct backward read.
        earliest: first position at which each rerunnable op may run again.
        latest: last position at which each rerunnable op may run again.
        needed: ops that every plan runs in forward.
        optional_readers: for each tensor, forward readers that some plans leave out.
        last_forward: last forward read by a needed op, or the op that makes it.
        held: tensors that stay to the end of forward whatever is chosen.
        credit_s: seconds of ops that no plan ever runs.
        cutoff_s: seconds of reruns beyond which no plan is of interest.
        pruned: whether tensors were left out that a plan could decide on; they are saved.
    """

    decided: tuple[int, ...]
    options: dict[int, tuple[CodecOption, ...]]
    rerunnable: frozenset[int]
    readers: dict[int, tuple[int, ...]]
    unsure: frozenset[int]
    first: dict[int, int]
    last: dict[int, int]
    earliest: dict[int, int]
    latest: dict[int, int]
    needed: frozenset[int]
    optional_readers: dict[int, tuple[int, ...]]
    last_forward: dict[int, int]
    held: frozenset[int]
    credit_s: float
    cutoff_s: float
    pruned: bool


def facts_of(problem: Problem, max_error: float, *, pruned_bytes: float = 0.0, cutoff_s: float = math.inf) -> Facts:
    """The facts of ``problem`` that matter within this error limit.

    Args:
        pruned_bytes: the smallest tensors are pruned that occupy no more than this together.
        cutoff_s: added seconds of a known plan: what only dearer plans do is left out.
    """
    first = problem.backward_reads
    last = {t: positions[-1] for t, positions in problem.direct_reads.items()}
    needed = _needed(problem, first)
    pruned = _pruned(problem, needed, pruned_bytes)
    decided = tuple(t for t in problem.candidates if t not in pruned)
    cutoff_s += _credit_s(problem, needed)
    chains = chain_seconds(problem, needed, len(problem.backward))
    makers = {problem.producer[t] for t in decided}
    rerunnable = frozenset(o for o in makers & chains.keys() if chains[o] <= cutoff_s * (1 + 1e-9))
    readers: dict[int, list[int]] = {t: [] for t in problem.producer}
    optional: dict[int, list[int]] = {t: [] for t in problem.producer}
    last_forward = dict(problem.producer)
    unsure: set[int] = set()
    for i, op in enumerate(problem.forward):
        for t in dict.fromkeys(op.inputs):
            if i in rerunnable:
                readers[t].append(i)
            if op.recomputable and not pruned.isdisjoint(op.outputs):
                unsure.update((t, *op.outputs))
            if i in needed:
                last_forward[t] = i
            else:
                optional[t].append(i)
    earliest = _earliest(problem)
    latest = _latest(problem, rerunnable, readers, set(decided))
    reachable = {t for t in decided if t in first or any(q in latest for q in readers[t])}
    rerunnable = frozenset(q for q in rerunnable if q in latest)
    return Facts(
        tuple(t for t in decided if t in reachable),
        {t: _options(problem, t, t in first, max_error) for t in decided},
        rerunnable,
        {t: tuple(q for q in qs if q in rerunnable) for t, qs in readers.items()},
        frozenset(unsure),
        first,
        last,
        earliest,
        latest,
        needed,
        {t: tuple(qs) for t, qs in optional.items()},
        last_forward,
        frozenset({*problem.outputs, *problem.mutations}),
        _credit_s(problem, needed),
        cutoff_s,
        bool(pruned),
    )


def chain_seconds(problem: Problem, needed: frozenset[int], position: int) -> dict[int, float]:
    """For each op that may run again by a position, the seconds of the cheapest chain that asks for it."""
    wanted = {t: 0.0 for t, first in problem.backward_reads.items() if first <= position}
    seconds: dict[int, float] = {}
    for o in range(len(problem.forward) - 1, -1, -1):
        op = problem.forward[o]
        asked = min((wanted[t] for t in op.outputs if t in wanted), default=math.inf)
        if op.recomputable and asked < math.inf:
            seconds[o] = asked + (op.seconds if o in needed else 0.0)
            for t in op.inputs:
                wanted[t] = min(wanted.get(t, math.inf), seconds[o])
    return seconds


def certain_forward(problem: Problem, facts: Facts) -> list[int]:
    """Bytes alive for certain before each forward position."""
    n = len(problem.forward)
    change = [0] * (n + 2)
    for t, made in problem.producer.items():
        if made in facts.needed:
            change[made + 1] += problem.tensors[t].size_bytes
            change[(n if t in facts.held else facts.last_forward[t]) + 1] -= problem.tensors[t].size_bytes
    return [problem.resident_bytes + alive for alive in accumulate(change)]


def saved_bytes(problem: Problem, facts: Facts) -> tuple[list[int], list[int]]:
    """Bytes of saved pruned tensors per forward and backward position, beside what counts for certain."""
    forward, backward = [0] * (len(problem.forward) + 1), [0] * (len(problem.backward) + 1)
    for t, last in facts.last.items():
        if t in facts.decided or t in problem.outputs:
            continue
        size = problem.tensors[t].size_bytes
        if t not in facts.held:
            forward[facts.last_forward[t] + 1] += size
        backward[0] += size
        backward[min(facts.first[t] + 1, last)] -= size
    return list(accumulate(forward)), list(accumulate(backward))


def certain_backward(problem: Problem, decided: set[int]) -> list[int]:
    """Bytes alive before each backward op that no decision changes."""
    n = len(problem.backward)
    last = {t: p for p, op in enumerate(problem.backward) for t in (*op.outputs, *op.inputs)}
    change = [0] * (n + 2)
    for p, op in enumerate(problem.backward):
        for t in op.outputs:
            change[p + 1] += problem.tensors[t].size_bytes
            change[(n if t in problem.gradients else last[t]) + 1] -= problem.tensors[t].size_bytes
    held = sum(problem.tensors[t].size_bytes for t in set(problem.outputs) if t in problem.producer)
    fixed = problem.resident_bytes + problem.tangent_bytes + held
    return [fixed + alive for alive in accumulate(change)]


def _needed(problem: Problem, first: dict[int, int]) -> frozenset[int]:
    wanted = {*problem.outputs, *problem.mutations, *problem.gradients}
    needed: set[int] = set()
    for i in range(len(problem.forward) - 1, -1, -1):
        op = problem.forward[i]
        must_store = not op.recomputable and not first.keys().isdisjoint(op.outputs)
        if op.pinned or must_store or not wanted.isdisjoint(op.outputs):
            needed.add(i)
            wanted.update(op.inputs)
    return frozenset(needed)


def _pruned(problem: Problem, needed: frozenset[int], room: float) -> frozenset[int]:
    """The smallest tensors, as long as all of them together fit into ``room``."""
    pruned: list[int] = []
    free = [t for t in problem.candidates if _has_choice(problem, t)]
    for t in sorted(free, key=lambda t: (problem.tensors[t].size_bytes, t)):
        room -= problem.tensors[t].size_bytes
        if room < 0:
            break
        if problem.producer[t] in needed:
            pruned.append(t)
    return frozenset(pruned)


def _has_choice(problem: Problem, t: int) -> bool:
    return bool(problem.tensors[t].codecs) or problem.forward[problem.producer[t]].recomputable


def _earliest(problem: Problem) -> dict[int, int]:
    """Over all candidates, pruned ones too: a recomputation of these may wake an op early."""
    earliest: dict[int, int] = {}
    wanted = dict(problem.backward_reads)
    candidates = set(problem.candidates)
    for i in range(len(problem.forward) - 1, -1, -1):
        op = problem.forward[i]
        early = min((wanted[t] for t in op.outputs if t in candidates and t in wanted), default=NEVER)
        if op.recomputable and early < NEVER:
            earliest[i] = early
            for t in op.inputs:
                wanted[t] = min(wanted.get(t, NEVER), early)
    return earliest


def _latest(
    problem: Problem, rerunnable: frozenset[int], readers: dict[int, list[int]], decided: set[int]
) -> dict[int, int]:
    first = problem.backward_reads
    latest: dict[int, int] = {}
    for i in sorted(rerunnable, reverse=True):
        for t in decided.intersection(problem.forward[i].outputs):
            late = first.get(t, max((latest[q] for q in readers[t] if q in latest), default=-1))
            if late >= 0:
                latest[i] = max(latest.get(i, -1), late)
    return latest


def _options(problem: Problem, t: int, direct: bool, max_error: float) -> tuple[CodecOption, ...]:
    """Options that fit the error limit and that neither SAVE nor another option beats in every number."""
    offered = [
        o
        for o in problem.tensors[t].codecs
        if o.error <= max_error and o.encoded_bytes < problem.tensors[t].size_bytes and (o.lossless or direct)
    ]
    kept: list[CodecOption] = []
    for o in sorted(offered, key=_costs):
        if not any(all(a <= b for a, b in zip(_costs(k), _costs(o), strict=True)) for k in kept):
            kept.append(o)
    return tuple(kept)


def _costs(o: CodecOption) -> tuple[float, ...]:
    times = (o.encode_s, o.decode_s)
    return (o.encoded_bytes, *times, o.encode_alloc_peak_bytes, o.decode_alloc_peak_bytes, not o.lossless, o.error)


def _credit_s(problem: Problem, needed: frozenset[int]) -> float:
    """Seconds of ops that neither the forward pass nor any backward read depends on."""
    wanted = set(problem.backward_reads)
    idle: list[float] = []
    for i in range(len(problem.forward) - 1, -1, -1):
        op = problem.forward[i]
        if i in needed or not wanted.isdisjoint(op.outputs):
            wanted.update(op.inputs)
        else:
            idle.append(op.seconds)
    return math.fsum(idle)


def reached(problem: Problem, actions: Actions) -> dict[int, Action]:
    """The tensors that backward comes to, directly or through recomputation, with what is done to each."""
    seen: dict[int, Action] = {}
    stack = list(problem.backward_reads)
    held = set(problem.outputs)
    while stack:
        t = stack.pop()
        if t in seen or t in held:
            continue
        seen[t] = actions.get(t, default_action(problem, t))
        if seen[t] is RECOMPUTE:
            stack.extend(problem.forward[problem.producer[t]].inputs)
    return seen


def completed(problem: Problem, found: Actions) -> dict[int, Action]:
    """A plan of the program as actions: pruned tensors are saved; what backward never comes to keeps its default."""
    seen = reached(problem, {t: found.get(t, SAVE) for t in problem.candidates})
    return {t: a for t, a in seen.items() if a is not default_action(problem, t)}
