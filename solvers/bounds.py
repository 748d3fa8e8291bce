"""What no plan can go below, whatever it keeps, encodes, recomputes or decodes, and however often."""

from __future__ import annotations

from collections.abc import Iterator

from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule, fused_op
from fxhybrid.ir.simulator import Timeline, describe_peak
from fxhybrid.units import format_bytes


def peak_lower_bound(problem: Problem) -> tuple[int, str]:
    """Computes a proven lower bound of the peak of every plan, and the instruction that holds it.

    While an op runs, its inputs exist and its outputs or its workspace come on top. In the backward pass
    there are in addition: the held outputs, the tangents, the gradients made so far, and the backward tensors
    that wait for a reader (no plan moves or encodes those). Forward tensors count only while an op that must
    run reads them.

    Returns:
        Bytes, and the instruction in the words of ``describe_peak``.
    """
    best, holder = problem.forward_base_bytes, "resident tensors"
    for height, words in (*_forward_heights(problem), *_backward_heights(problem)):
        if height > best:
            best, holder = height, words
    return best, holder


def holder_in_words(problem: Problem, schedule: Schedule, timeline: Timeline, most: int = 3) -> str:
    """Names the instruction at the peak and the largest tensors alive then: ``backward mm, with x (8 MiB)``."""
    at = timeline.peak_at
    alive = [
        value
        for value, born, dies in zip(schedule.values, timeline.birth, timeline.death, strict=True)
        if born <= at <= dies
    ]
    alive.sort(key=lambda value: -value.size_bytes)
    named = [
        f"{problem.tensors[v.tensor].name}{' encoded' if v.encoded else ''} ({format_bytes(v.size_bytes)})"
        for v in alive[:most]
    ]
    more = [f"{len(alive) - most} more"] if len(alive) > most else []
    words = describe_peak(problem, schedule, timeline)
    return f"{words}, with {', '.join([*named, *more])}" if named else words


def _sum(problem: Problem, tensors: set[int]) -> int:
    return sum(problem.tensors[t].size_bytes for t in tensors)


def _forward_heights(problem: Problem) -> Iterator[tuple[int, str]]:
    """Yields what must be alive while each forward op runs: tensors still to be read raw by an op that must run.

    Outputs and mutations stay. Anything else between two reads could be encoded or, in richer plans than
    today's, recomputed; so only the op's own inputs count.
    """
    staying = {*problem.outputs, *problem.mutations}
    alive: set[int] = set()
    alive_bytes = problem.forward_base_bytes
    for op in (problem.forward[i] for i in sorted(problem.required_forward_ops())):
        yield alive_bytes + _sum(problem, set(op.inputs) - alive) + problem.top_bytes(op), f"forward {op.name}"
        made = staying.intersection(op.outputs)
        alive |= made
        alive_bytes += _sum(problem, made)


def _backward_heights(problem: Problem) -> Iterator[tuple[int, str]]:
    gradients = set(problem.gradients)
    last: dict[int, int] = {}
    for p, op in enumerate(problem.backward):
        for t in (*op.inputs, *op.outputs):
            last[t] = p
    alive = {t for t in problem.outputs if t in problem.producer}
    alive_bytes = problem.backward_base_bytes + _sum(problem, alive)
    for p, op in enumerate(problem.backward):
        inputs = {t for t in op.inputs if t in problem.producer}
        height = _sum(problem, inputs - alive) + problem.top_bytes(op)
        if op.fusion:  # the form that reads the mask's sources may take less
            fused = fused_op(problem, op, op.fusion)
            sources = {t for t in fused.inputs if t in problem.producer}
            height = min(height, _sum(problem, sources - alive) + problem.top_bytes(fused))
        yield alive_bytes + height, f"backward {op.name}"
        made = set(op.outputs)
        dying = {t for t in (*op.inputs, *op.outputs) if last[t] == p and t not in problem.producer} - gradients
        alive_bytes += _sum(problem, made) - _sum(problem, dying)
        alive.update(made)
        alive -= dying
