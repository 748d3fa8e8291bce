"""A step of several graphs as plain numbers: parts with Python between them, simulated together.

The forward halves of the parts run in order, the backward halves in an order of their own. Each part is a problem by
itself, whose schedule is what runs; what the parts leave for each other is added up here. A storage that goes from part
to part is counted once while any of them, or Python, holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxhybrid.ir.part import Headroom, Part, PartTimeline


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
        changed: whether Python's own operators change it in place.
        is_laid_out: whether it is an image in channels_last; a copy of it is made before anything else is traced.
    """

    size_bytes: int
    maker: int
    last: int
    held: bool = False
    is_root: bool = False
    changed: bool = False
    is_laid_out: bool = False


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
        headroom: how far the halves of each part may rise further while the step rises no higher.
        waiting_bytes: kept between forward and backward pass, beside what lives through the whole step.
        overhead_s: seconds beyond running every op once.
    """

    peak_bytes: int
    forward_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    before_bytes: tuple[int, ...]
    traced_bytes: int
    headroom: tuple[Headroom, ...]
    waiting_bytes: int
    overhead_s: float


def sequence_peak(sequence: PartSequence, needs: Sequence[PartTimeline]) -> SequencePeak:
    """Adds up what the parts need, in the order in which their halves run."""
    tally = _Tally(sequence, needs)
    before = [tally.before_forward(k) for k in range(len(sequence.parts))]
    halves = [alive + need.forward_bytes for alive, need in zip(before, needs, strict=True)]
    forward = [max(half, tally.between_forward(k)) for k, half in enumerate(halves)]
    traced = max(map(tally.while_tracing, range(len(sequence.parts) + 1)))
    after = tally.after_forward()
    runs = [{k: tally.run_backward(k) for k in sequence.backward}]
    end = tally.end_bytes()
    for order in sequence.partial:  # parts that get no gradient keep what they store
        tally = _Tally(sequence, needs)
        runs.append({k: tally.run_backward(k) for k in order})
    highest = max(*forward, after, end, *(max(points) for run in runs for points in run.values()))
    headroom = (
        Headroom(highest - half, highest - max((run[k][0] for run in runs if k in run), default=highest))
        for k, half in enumerate(halves)
    )
    return SequencePeak(
        peak_bytes=highest,
        forward_bytes=tuple(forward),
        backward_bytes=tuple(max(runs[0].get(k, (0,))) for k in range(len(needs))),
        before_bytes=tuple(before),
        traced_bytes=traced,
        headroom=tuple(headroom),
        waiting_bytes=after - sequence.resident_bytes - sequence.tail.rise_bytes,
        overhead_s=math.fsum(need.overhead_s for need in needs),
    )


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
        held = self._held_by_python(k, k - 1) | taken
        alive = self._between_halves(k, self._kept(k) | held)
        alive += self._shared_bytes({i for i in held if self.sequence.shared[i].is_laid_out})
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

    def run_backward(self, k: int) -> tuple[int, int]:
        """Returns the highest points of a part's backward half and behind it, and leaves its gradients behind."""
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
        return within, self._beside_half(k, kept) + part.backward_rise_bytes

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
