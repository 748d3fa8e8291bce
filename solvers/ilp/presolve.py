"""Presolve: which tensors the integer program decides on, which ops it may recompute, and when.

Positions are those of backward ops. ``first`` and ``last`` are a tensor's direct backward reads; ``earliest``
and ``latest`` bound the position at which an op may be recomputed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from fxhybrid.ir.dominance import undominated
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Action, Actions
from fxhybrid.ir.problem import CodecOption, Op, Problem
from fxhybrid.solvers.base import default_action

NEVER = 1 << 60
CUTOFF_SLACK = 1 + 1e-9  # chains that cost as much as the known plan are left in


@dataclass(frozen=True)
class Presolved:
    """Holds what is known about one problem before the first variable.

    Attributes:
        decided: candidates with variables, in order.
        options: codec options of each decided tensor that are worth offering.
        rerunnable: ops that may be recomputed in backward.
        readers: for each tensor, the rerunnable ops that read it.
        undecided: what an op with a pruned output reads and makes: it may run earlier than the variables say.
        first: first direct backward read.
        last: last direct backward read.
        earliest: first position at which each rerunnable op may be recomputed.
        latest: last position at which each rerunnable op may be recomputed.
        required: ops that every plan runs in forward.
        optional_readers: for each tensor, forward readers that some plans leave out.
        last_forward: last forward read by a required op, or the op that makes it.
        held: tensors that stay to the end of forward whatever is chosen.
        cutoff_s: seconds of reruns beyond which no plan is of interest.
        pruned: whether tensors were left out that a plan could decide on; they are saved.
    """

    decided: tuple[int, ...]
    options: dict[int, tuple[CodecOption, ...]]
    rerunnable: frozenset[int]
    readers: dict[int, tuple[int, ...]]
    undecided: frozenset[int]
    first: dict[int, int]
    last: dict[int, int]
    earliest: dict[int, int]
    latest: dict[int, int]
    required: frozenset[int]
    optional_readers: dict[int, tuple[int, ...]]
    last_forward: dict[int, int]
    held: frozenset[int]
    cutoff_s: float
    pruned: bool


@dataclass(frozen=True)
class _ForwardReaders:
    """Holds who reads each tensor in forward, as ``Presolved`` says."""

    rerunnable: dict[int, list[int]]
    optional: dict[int, list[int]]
    last: dict[int, int]
    undecided: set[int]


def presolve(problem: Problem, max_error: float, *, pruned_bytes: float = 0.0, cutoff_s: float = math.inf) -> Presolved:
    """Works out what matters within this error limit.

    Args:
        problem: the step.
        max_error: limit of the error.
        pruned_bytes: the smallest tensors are pruned that occupy no more than this together.
        cutoff_s: added seconds of a known plan: what only costlier plans do is left out.
    """
    first = problem.backward_reads
    required = problem.required_forward_ops(t for t in first if not _maker(problem, t).recomputable)
    pruned = _pruned(problem, required, pruned_bytes)
    decided = tuple(t for t in problem.candidates if t not in pruned)
    chains = chain_seconds(problem, required, len(problem.backward))
    makers = {problem.producer[t] for t in decided}
    affordable = frozenset(o for o in makers & chains.keys() if chains[o] <= cutoff_s * CUTOFF_SLACK)
    readers = _forward_readers(problem, required, affordable, pruned)
    latest = _latest(problem, affordable, readers.rerunnable, set(decided))
    rerunnable = affordable & latest.keys()
    return Presolved(
        decided=tuple(t for t in decided if t in first or any(q in latest for q in readers.rerunnable[t])),
        options={t: _options(problem, t, t in first, max_error) for t in decided},
        rerunnable=rerunnable,
        readers={t: tuple(q for q in ops if q in rerunnable) for t, ops in readers.rerunnable.items()},
        undecided=frozenset(readers.undecided),
        first=first,
        last={t: positions[-1] for t, positions in problem.direct_reads.items()},
        earliest=_earliest(problem),
        latest=latest,
        required=required,
        optional_readers={t: tuple(ops) for t, ops in readers.optional.items()},
        last_forward=readers.last,
        held=frozenset({*problem.outputs, *problem.mutations}),
        cutoff_s=cutoff_s,
        pruned=bool(pruned),
    )


def _maker(problem: Problem, t: int) -> Op:
    return problem.forward[problem.producer[t]]


def _forward_readers(
    problem: Problem, required: frozenset[int], rerunnable: frozenset[int], pruned: frozenset[int]
) -> _ForwardReaders:
    rerunnable_readers: dict[int, list[int]] = {t: [] for t in problem.producer}
    optional: dict[int, list[int]] = {t: [] for t in problem.producer}
    last = dict(problem.producer)
    undecided: set[int] = set()
    for i, op in enumerate(problem.forward):
        for t in dict.fromkeys(op.inputs):
            if i in rerunnable:
                rerunnable_readers[t].append(i)
            if op.recomputable and not pruned.isdisjoint(op.outputs):
                undecided.update((t, *op.outputs))
            if i in required:
                last[t] = i
            else:
                optional[t].append(i)
    return _ForwardReaders(rerunnable_readers, optional, last, undecided)


def chain_seconds(problem: Problem, required: frozenset[int], position: int) -> dict[int, float]:
    """Computes, per op that may be recomputed by a position, the seconds of the cheapest chain that asks for it."""
    asked_s = {t: 0.0 for t, first in problem.backward_reads.items() if first <= position}
    seconds: dict[int, float] = {}
    for o in range(len(problem.forward) - 1, -1, -1):
        op = problem.forward[o]
        least_s = min((asked_s[t] for t in op.outputs if t in asked_s), default=math.inf)
        if op.recomputable and least_s < math.inf:
            seconds[o] = least_s + (op.seconds if o in required else 0.0)
            for t in op.inputs:
                asked_s[t] = min(asked_s.get(t, math.inf), seconds[o])
    return seconds


def certain_forward(problem: Problem, presolved: Presolved) -> list[int]:
    """Adds up the bytes alive for certain before each forward position."""
    n = len(problem.forward)
    change = [0] * (n + 2)
    for t, made in problem.producer.items():
        if made in presolved.required:
            change[made + 1] += problem.tensors[t].size_bytes
            change[(n if t in presolved.held else presolved.last_forward[t]) + 1] -= problem.tensors[t].size_bytes
    return [problem.forward_base_bytes + alive for alive in accumulate(change)]


def saved_bytes(problem: Problem, presolved: Presolved) -> tuple[list[int], list[int]]:
    """Adds up saved pruned tensors per forward and backward position, in addition to what is alive for certain."""
    forward, backward = [0] * (len(problem.forward) + 1), [0] * (len(problem.backward) + 1)
    for t, last in presolved.last.items():
        if t in presolved.decided or t in problem.outputs:
            continue
        size = problem.tensors[t].size_bytes
        if t not in presolved.held:
            forward[presolved.last_forward[t] + 1] += size
        backward[0] += size
        backward[min(presolved.first[t] + 1, last)] -= size
    return list(accumulate(forward)), list(accumulate(backward))


def certain_backward(problem: Problem) -> list[int]:
    """Adds up the bytes alive before each backward op that no decision changes."""
    n = len(problem.backward)
    last = {t: p for p, op in enumerate(problem.backward) for t in (*op.outputs, *op.inputs)}
    change = [0] * (n + 2)
    for p, op in enumerate(problem.backward):
        for t in op.outputs:
            change[p + 1] += problem.tensors[t].size_bytes
            change[(n if t in problem.gradients else last[t]) + 1] -= problem.tensors[t].size_bytes
    held = sum(problem.tensors[t].size_bytes for t in set(problem.outputs) if t in problem.producer)
    fixed = problem.backward_base_bytes + held
    return [fixed + alive for alive in accumulate(change)]


def _pruned(problem: Problem, required: frozenset[int], room: float) -> frozenset[int]:
    """Picks the smallest tensors, as long as all of them together fit into ``room`` bytes."""
    pruned: list[int] = []
    free = [t for t in problem.candidates if _has_choice(problem, t)]
    for t in sorted(free, key=lambda t: (problem.tensors[t].size_bytes, t)):
        room -= problem.tensors[t].size_bytes
        if room < 0:
            break
        if problem.producer[t] in required:
            pruned.append(t)
    return frozenset(pruned)


def _has_choice(problem: Problem, t: int) -> bool:
    return bool(problem.tensors[t].codecs) or problem.forward[problem.producer[t]].recomputable


def _earliest(problem: Problem) -> dict[int, int]:
    """Looks at all candidates, pruned ones too: a recomputation of these may trigger an op early."""
    earliest: dict[int, int] = {}
    asked = dict(problem.backward_reads)
    candidates = set(problem.candidates)
    for i in range(len(problem.forward) - 1, -1, -1):
        op = problem.forward[i]
        early = min((asked[t] for t in op.outputs if t in candidates and t in asked), default=NEVER)
        if op.recomputable and early < NEVER:
            earliest[i] = early
            for t in op.inputs:
                asked[t] = min(asked.get(t, NEVER), early)
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
    """Returns options that fit the error limit and that neither SAVE nor another option beats in every number."""
    offered = [
        o
        for o in problem.tensors[t].codecs
        if o.error <= max_error and o.encoded_bytes < problem.tensors[t].size_bytes and (o.lossless or direct)
    ]
    kept = [offered[place] for place in undominated(offered, range(len(offered)))]
    return tuple(sorted(kept, key=lambda o: (o.encoded_bytes, o.encode_s, o.decode_s)))


def reached(problem: Problem, actions: Actions) -> dict[int, Action]:
    """Returns the tensors that backward comes to, directly or through recomputation, with what is done to each."""
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
    """Turns a solution into actions: pruned tensors are saved; what backward never comes to keeps its default."""
    seen = reached(problem, {t: found.get(t, SAVE) for t in problem.candidates})
    return {t: a for t, a in seen.items() if a is not default_action(problem, t)}
