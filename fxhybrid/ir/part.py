"""One part of a step of several graphs as plain numbers, and what it needs by a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxhybrid.ir.plan import RECOMPUTE, Action, Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Kind, Schedule, lower
from fxhybrid.ir.simulator import simulate

_BACKWARD_OPS = (Kind.RUN, Kind.FUSED, Kind.FASTER)


@dataclass(frozen=True)
class Source:
    """Describes an earlier part whose forward half is recomputed for what a later one did not keep.

    Attributes:
        part: its position.
        reads: what earlier parts made of it, which is kept for that: shared storages and their bytes.
        rise_bytes: how far memory rises above what it takes while it runs and stores nothing, its outputs included.
        seconds: that it takes.
    """

    part: int
    reads: tuple[tuple[int, int], ...]
    rise_bytes: int
    seconds: float


@dataclass(frozen=True)
class DyingTangent:
    """Describes the gradient of an output that nobody keeps.

    Attributes:
        position: among the tangents.
        size_bytes: what it takes.
        last: the last backward operator that reads it, by position; -1 for none.
    """

    position: int
    size_bytes: int
    last: int


@dataclass(frozen=True, eq=False)
class Part:
    """Holds one part of the step.

    Attributes:
        problem: of the part alone. Storages that it takes from others, and its own outputs, are tensors that live to
            the end of its forward half (``mutations``).
        arriving: shared storages that it takes and decides on, by tensor.
        taken: shared storages that it takes as they are, and keeps for its backward half.
        leaving: shared storages that it makes, by tensor.
        input_gradients: shared storages whose gradients it makes, by tensor; one tensor may be the gradient of several.
        passing: shared storages whose gradient is the very one of an output.
        beside_bytes: what Python's own operators before the part keep for their backward pass.
        rise_bytes: what they take while they run, beyond what is alive when the part begins.
        backward_rise_bytes: what their backward pass takes, beyond what is alive when the part's backward half is over.
        passing_bytes: gradients that Python's operators have made when the part's backward half begins, for others.
        loose_bytes: what else Python holds when the part begins.
        dying: gradients of its outputs that die in its backward half. The others live through the whole half.
        sources: earlier parts that can recompute what it takes, by tensor of ``arriving``. To recompute such a tensor
            is an action of the whole step: the part by itself cannot.
    """

    problem: Problem
    arriving: Mapping[int, int] = field(default_factory=dict)
    taken: frozenset[int] = frozenset()
    leaving: Mapping[int, int] = field(default_factory=dict)
    input_gradients: Mapping[int, frozenset[int]] = field(default_factory=dict)
    passing: frozenset[int] = frozenset()
    beside_bytes: int = 0
    rise_bytes: int = 0
    backward_rise_bytes: int = 0
    passing_bytes: int = 0
    loose_bytes: int = 0
    dying: tuple[DyingTangent, ...] = ()
    sources: Mapping[int, Source] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PartTimeline:
    """Holds what one part needs by a plan.

    Attributes:
        forward_bytes: the highest point of its forward half, above what was alive before.
        backward_bytes: likewise of its backward half, and of earlier parts that are recomputed before it; gradients of
            its outputs and what it stored itself are included.
        beside_others_bytes: the same where shared storages that it keeps live through its backward half, since others
            keep them, too.
        stored_bytes: what it keeps between the halves, shared storages left out.
        stored: shared storages that it keeps as they are, or has kept for the parts that are recomputed.
        recomputed: tensors that it takes and does not keep; their sources are recomputed.
        gradient_bytes: gradients of parameters and of the step's own inputs that it leaves.
        overhead_s: seconds beyond running every op once.
    """

    forward_bytes: int
    backward_bytes: int
    beside_others_bytes: int
    stored_bytes: int
    stored: frozenset[int]
    recomputed: frozenset[int]
    gradient_bytes: int
    overhead_s: float


@dataclass(frozen=True)
class Headroom:
    """Says how far the halves of a part may rise beyond what they take by a plan, and the step takes no more.

    Attributes:
        forward_bytes: the forward half.
        backward_bytes: the backward half.
    """

    forward_bytes: int
    backward_bytes: int


NO_HEADROOM = Headroom(0, 0)


def recomputed_by(part: Part, actions: Actions) -> frozenset[int]:
    """Returns the tensors that a plan recomputes by earlier parts."""
    return frozenset(t for t in part.sources if actions.get(t) is RECOMPUTE)


def own_actions(part: Part, actions: Actions) -> dict[int, Action]:
    """Returns what the part itself does: what earlier parts recompute is there when its backward half begins."""
    recomputed = recomputed_by(part, actions)
    return {t: action for t, action in actions.items() if t not in recomputed}


def part_timeline(part: Part, actions: Actions) -> PartTimeline:
    """Simulates one part by its actions in a plan of the whole step."""
    return scheduled_timeline(part, actions, lower(part.problem, own_actions(part, actions)))


def scheduled_timeline(part: Part, actions: Actions, schedule: Schedule) -> PartTimeline:
    """Simulates one part by a schedule of its own actions."""
    problem, dropped = part.problem, recomputed_by(part, actions)
    timeline = simulate(problem, schedule)
    n = schedule.n_forward
    during = timeline.during_bytes - problem.resident_bytes
    ends = {each.op: i for i, each in enumerate(schedule.instructions) if i >= n and each.kind in _BACKWARD_OPS}
    for tangent in part.dying:
        during[ends.get(tangent.last, n - 1) + 1 :] -= tangent.size_bytes
    crossing = [i for i in range(len(schedule.values)) if timeline.birth[i] < n <= timeline.death[i]]
    recomputed = dropped.intersection(schedule.values[i].tensor for i in crossing)
    crossing = [i for i in crossing if schedule.values[i].tensor not in recomputed]
    keys = {**part.arriving, **part.leaving}
    raw = {i: keys[v.tensor] for i in crossing if not (v := schedule.values[i]).encoded and v.tensor in keys}
    gradients = {t for t in problem.gradients if t not in part.input_gradients}
    longer = during[n:].copy()
    for i in raw:
        longer[timeline.death[i] + 1 - n :] += schedule.values[i].size_bytes
    kept_bytes = sum(schedule.values[i].size_bytes for i in crossing)
    sources, rise_bytes = _recomputation(part, recomputed)
    reads = dict(read for source in sources for read in source.reads)
    read_bytes = sum(reads.values())
    recomputing_bytes = problem.tangent_bytes + kept_bytes + read_bytes + rise_bytes if sources else 0
    return PartTimeline(
        forward_bytes=int(during[:n].max(initial=0)),
        backward_bytes=int(during[n:].max(initial=recomputing_bytes)),
        beside_others_bytes=max(int(longer.max(initial=0)) + read_bytes, recomputing_bytes),
        stored_bytes=sum(schedule.values[i].size_bytes for i in crossing if i not in raw),
        stored=part.taken.union(raw.values(), reads),
        recomputed=recomputed,
        gradient_bytes=sum(problem.tensors[t].size_bytes for t in gradients),
        overhead_s=timeline.overhead_s + sum(source.seconds for source in sources),
    )


def _recomputation(part: Part, recomputed: frozenset[int]) -> tuple[list[Source], int]:
    """Returns the parts that are recomputed, one after the other, and how far memory rises meanwhile."""
    sources = sorted({part.sources[t] for t in recomputed}, key=lambda source: source.part)
    made_bytes = highest = 0
    for source in sources:
        highest = max(highest, made_bytes + source.rise_bytes)
        made_bytes += sum(part.problem.tensors[t].size_bytes for t in recomputed if part.sources[t] == source)
    return sources, highest
