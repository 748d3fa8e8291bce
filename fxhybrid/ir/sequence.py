"""A step of several graphs as plain numbers: parts with Python between them, simulated together.

The forward halves of the parts run in order, the backward halves in an order of their own. Each part is a problem by
itself, whose schedule is what runs; what the parts leave for each other is added up here. A storage that goes from part
to part is counted once while any of them, or Python, holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Kind, lower
from fxhybrid.ir.simulator import simulate

_BACKWARD_OPS = (Kind.RUN, Kind.FUSED, Kind.FASTER)


@dataclass(frozen=True)
class Shared:
    """Describes a storage that goes from part to part, or to the caller.

    Attributes:
        size_bytes: what the allocator counts for it.
        maker: the part that makes it; where Python makes it, the first part that takes it.
        last: the last part in whose forward half Python still holds it; the number of parts where that is the end of
            the whole forward pass.
        held: whether Python holds it through the backward pass of the parts, too.
        is_root: whether the backward pass begins with its gradient, which is held to the end then.
    """

    size_bytes: int
    maker: int
    last: int
    held: bool = False
    is_root: bool = False


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
        dying: gradients of its outputs that die in its backward half: bytes, and the last operator that reads them, by
            position; -1 for none. The others live through the whole half.
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
    dying: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Tail:
    """Holds what Python's own operators after the last part take.

    Attributes:
        beside_bytes: what they keep for their backward pass.
        gone_bytes: the part of it that is gone when the first backward half begins.
        rise_bytes: what they take while they run, and then in their backward pass, beyond what is alive at the end of
            the forward pass.
        left_bytes: gradients that Python's operators, wherever they run, leave behind in the end.
    """

    beside_bytes: int = 0
    gone_bytes: int = 0
    rise_bytes: int = 0
    left_bytes: int = 0


@dataclass(frozen=True, eq=False)
class PartSequence:
    """Holds the whole step.

    Attributes:
        parts: in the order of their forward halves.
        backward: the parts, in the order of their backward halves; those that have none are left out.
        shared: the storages that go from part to part.
        resident_bytes: alive through the whole step.
        update_bytes: how far memory rises above the gradients while the optimizer steps; None without one.
        tail: what Python's own operators after the last part take.
        partial: the same as ``backward`` in steps in which some results get no gradient.
    """

    parts: tuple[Part, ...]
    backward: tuple[int, ...]
    shared: tuple[Shared, ...]
    resident_bytes: int
    update_bytes: int | None = None
    tail: Tail = Tail()
    partial: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class PartTimeline:
    """Holds what one part needs by a plan.

    Attributes:
        forward_bytes: the highest point of its forward half, above what was alive before.
        backward_bytes: likewise of its backward half; gradients of its outputs and what it stored itself are included.
        beside_others_bytes: the same where shared storages that it keeps live through its backward half, since others
            keep them, too.
        stored_bytes: what it keeps between the halves, shared storages left out.
        stored: shared storages that it keeps as they are.
        gradient_bytes: gradients of parameters and of the step's own inputs that it leaves.
        overhead_s: seconds beyond running every op once.
    """

    forward_bytes: int
    backward_bytes: int
    beside_others_bytes: int
    stored_bytes: int
    stored: frozenset[int]
    gradient_bytes: int
    overhead_s: float


@dataclass(frozen=True)
class SequencePeak:
    """Holds the peak of a sequence.

    Attributes:
        peak_bytes: highest point of the step.
        forward_bytes: highest point in each part's forward half, and before it since the last part.
        backward_bytes: highest point in each part's backward half, and after it until the next; 0 where it has none.
        before_bytes: alive before each part's forward half.
        traced_bytes: the most that is alive where a step may leave the path and trace a graph: before a part, or at
            the end of the forward pass.
        waiting_bytes: kept between forward and backward pass, beside what lives through the whole step.
        overhead_s: seconds beyond running every op once.
    """

    peak_bytes: int
    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    before_bytes: tuple[int, ...]
    traced_bytes: int
    waiting_bytes: int
    overhead_s: float


def part_timeline(part: Part, actions: Actions) -> PartTimeline:
    """Simulates one part by its own actions."""
    problem = part.problem
    schedule = lower(problem, actions)
    timeline = simulate(problem, schedule)
    n = schedule.n_forward
    during = timeline.during_bytes - problem.resident_bytes
    ends = {each.op: i for i, each in enumerate(schedule.instructions) if i >= n and each.kind in _BACKWARD_OPS}
    for size_bytes, last in part.dying:
        during[ends.get(last, n - 1) + 1 :] -= size_bytes
    crossing = [i for i in range(len(schedule.values)) if timeline.birth[i] < n <= timeline.death[i]]
    keys = {**part.arriving, **part.leaving}
    raw = {i: keys[v.tensor] for i in crossing if not (v := schedule.values[i]).encoded and v.tensor in keys}
    gradients = {t for t in problem.gradients if t not in part.input_gradients}
    longer = during[n:].copy()
    for i in raw:
        longer[timeline.death[i] + 1 - n :] += schedule.values[i].size_bytes
    return PartTimeline(
        forward_bytes=int(during[:n].max(initial=0)),
        backward_bytes=int(during[n:].max(initial=0)),
        beside_others_bytes=int(longer.max(initial=0)),
        stored_bytes=sum(schedule.values[i].size_bytes for i in crossing if i not in raw),
        stored=part.taken.union(raw.values()),
        gradient_bytes=sum(problem.tensors[t].size_bytes for t in gradients),
        overhead_s=timeline.overhead_s,
    )


def sequence_peak(sequence: PartSequence, needs: Sequence[PartTimeline]) -> SequencePeak:
    """Adds up what the parts need, in the order in which their halves run."""
    tally = _Tally(sequence, needs)
    before, forward = [], []
    for k in range(len(sequence.parts)):
        alive = tally.before_forward(k)
        before.append(alive)
        forward.append(max(alive + needs[k].forward_bytes, tally.between_forward(k)))
    traced = max(map(tally.while_tracing, range(len(sequence.parts) + 1)))
    after = tally.after_forward()
    backward = [0] * len(sequence.parts)
    for k in sequence.backward:
        backward[k] = tally.run_backward(k)
    end = tally.end_bytes()
    overhead_s = math.fsum(need.overhead_s for need in needs)
    highest = max(*forward, after, *backward, end, _left_out_bytes(sequence, needs))
    waiting = after - sequence.resident_bytes - sequence.tail.rise_bytes
    return SequencePeak(highest, tuple(forward), tuple(backward), tuple(before), traced, waiting, overhead_s)


def _left_out_bytes(sequence: PartSequence, needs: Sequence[PartTimeline]) -> int:
    """Returns the highest point of backward passes in which some parts get no gradient, and keep what they store."""
    highest = 0
    for backward in sequence.partial:
        tally = _Tally(sequence, needs)
        highest = max(highest, *map(tally.run_backward, backward))
    return highest


class _Tally:
    """Keeps account of what lives between the halves."""

    def __init__(self, sequence: PartSequence, needs: Sequence[PartTimeline]) -> None:
        self.sequence = sequence
        self.needs = needs
        self.pending = set(range(len(needs)))  # parts whose backward half has not run
        self.gradient_bytes = 0
        # gradients of shared storages on their way to the storage's maker: by what made them, bytes
        self.carried: dict[int, dict[tuple[int, int], int]] = {}

    def before_forward(self, k: int) -> int:
        """Returns what is alive when a part's forward half begins, less what it takes from others."""
        part = self.sequence.parts[k]
        shared = (self._kept(k) | self._held_by_python(k, k) | part.taken) - set(part.arriving.values())
        return self._between_halves(k, shared) + part.loose_bytes

    def between_forward(self, k: int) -> int:
        """Returns the highest point while Python's own operators run before a part."""
        part = self.sequence.parts[k]
        return self.before_forward(k) + self._shared_bytes(set(part.arriving.values())) + part.rise_bytes

    def while_tracing(self, k: int) -> int:
        """Returns what is alive while a graph is traced in place of a part, or behind the last one.

        All that its frame was given lives on, whether it is read or not: what was alive when the last part was over.
        """
        parts = self.sequence.parts
        taken = {*parts[k].arriving.values(), *parts[k].taken} if k < len(parts) else set()
        alive = self._between_halves(k, self._kept(k) | self._held_by_python(k, k - 1) | taken)
        beside = self.sequence.tail.beside_bytes if k == len(parts) else 0
        return alive + beside + max(part.loose_bytes for part in parts[max(k - 1, 0) : k + 1])

    def after_forward(self) -> int:
        """Returns the highest point while Python's own operators run after the last part, forward and backward."""
        n, tail = len(self.needs), self.sequence.tail
        alive = self._between_halves(n, self._kept(n) | self._held_by_python(n, n))
        return alive + tail.beside_bytes + tail.rise_bytes

    def _between_halves(self, k: int, shared: set[int]) -> int:
        """Returns what is alive before a part's forward half, or behind the last one, with some shared storages."""
        return (
            self.sequence.resident_bytes
            + sum(need.stored_bytes for need in self.needs[:k])
            + sum(part.beside_bytes for part in self.sequence.parts[: k + 1])
            + self._shared_bytes(shared)
        )

    def _held_by_python(self, k: int, since: int) -> set[int]:
        """Returns the shared storages of the parts before one that Python holds, or has held since an earlier one."""
        return {i for i, s in enumerate(self.sequence.shared) if s.maker < k and (s.held or since <= s.last)}

    def _kept(self, k: int) -> set[int]:
        """Returns the shared storages that the parts before one keep."""
        return {key for j in range(k) for key in self.needs[j].stored}

    def run_backward(self, k: int) -> int:
        """Returns the highest point of a part's backward half and behind it, and leaves its gradients behind."""
        part, need = self.sequence.parts[k], self.needs[k]
        self.pending.discard(k)
        for key in part.leaving.values():
            self.carried.pop(key, None)  # counted in the part itself from here on
        kept = {key for j in self.pending for key in self.needs[j].stored}
        kept |= {i for i, s in enumerate(self.sequence.shared) if s.held}
        own = need.backward_bytes if kept.isdisjoint(need.stored) else need.beside_others_bytes
        within = self._beside_half(k, (kept - need.stored) | part.taken) + own
        self.gradient_bytes += need.gradient_bytes
        self.gradient_bytes += self._shared_bytes({k for k in part.leaving.values() if self.sequence.shared[k].is_root})
        for t, keys in part.input_gradients.items():
            for key in keys:
                self.carried.setdefault(key, {})[k, t] = part.problem.tensors[t].size_bytes
        for key in part.passing:
            self.carried.setdefault(key, {})[k, -1 - key] = self.sequence.shared[key].size_bytes
        return max(within, self._beside_half(k, kept) + part.backward_rise_bytes)

    def _beside_half(self, k: int, shared: set[int]) -> int:
        """Returns what is alive beside a part's backward half, or behind it, with some shared storages."""
        return (
            self.sequence.resident_bytes
            + sum(self.needs[j].stored_bytes for j in self.pending)
            + sum(self.sequence.parts[j].beside_bytes for j in self.pending | {k})
            + (self.sequence.tail.beside_bytes - self.sequence.tail.gone_bytes)
            + self._shared_bytes(shared)
            + sum({made: size for each in self.carried.values() for made, size in each.items()}.values())
            + self.sequence.parts[k].passing_bytes
            + self.gradient_bytes
        )

    def end_bytes(self) -> int:
        """Returns what is alive while the optimizer steps; 0 without one."""
        if self.sequence.update_bytes is None:
            return 0
        held = {i for i, s in enumerate(self.sequence.shared) if s.held}
        outside = sum(self.sequence.parts[j].beside_bytes for j in self.pending)
        pending = sum(self.needs[j].stored_bytes for j in self.pending) + outside
        alive = self.sequence.resident_bytes + self.gradient_bytes + self._shared_bytes(held) + pending
        return alive + self.sequence.tail.left_bytes + self.sequence.update_bytes

    def _shared_bytes(self, keys: set[int] | frozenset[int]) -> int:
        return sum(self.sequence.shared[key].size_bytes for key in keys)
