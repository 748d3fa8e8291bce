"""From where to where each tensor occupies memory under a plan.

Problem
    A tensor is made in the forward pass, in a rerun, or by decoding, and freed after its last use. Its live range is a
    step function of the slots. It depends on the tensor's code and on five numbers only.

Data
    use     backward op before which the tensor is first needed, or NEVER
    rerun   backward op before which the op that makes it runs again, or NEVER
    read    last slot of the forward pass at which it is made or read, or -1 where it is not made there
    last    2 s if the instructions before the op of slot s read it last, 2 s + 1 if that op itself does, or -1

Method
    saved        [read's op, death]
    encoded      raw until ``read``, encoded from there to ``use``, decoded from there to death
    recomputed   raw until ``read``, again from ``rerun`` to death
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, SAVED, ProblemTables

MAX_KNOWN = 1 << 17  # live ranges remembered
Interval = tuple[int, int, int]  # first slot, slot after the last, bytes


class LiveRange(NamedTuple):
    """Where a tensor is alive, and what it costs.

    Attributes:
        steps: slots from which on more bytes, or fewer if negative, are alive right before the slots' own ops. Where
            every plan makes the tensor in the forward pass, its making is no step: ``base_live`` has that.
        code: the codec's code if it is stored encoded, else SAVED.
        encoded_at: slot before which it is encoded, or -1.
        decoded_at: slot before which it is decoded, or -1.
        group_death: slot whose decodings and reruns read it last, or -1.
        seconds: of encoding and decoding.
        lossy: whether other bits come back.
        error2: squared error.
    """

    steps: tuple[tuple[int, int], ...] = ()
    code: int = SAVED
    encoded_at: int = -1
    decoded_at: int = -1
    group_death: int = -1
    seconds: float = 0.0
    lossy: bool = False
    error2: float = 0.0


EMPTY = LiveRange()


class LiveRanges:
    """Finds live ranges of one problem's tensors; they are remembered, as a search meets the same ones again."""

    def __init__(self, tables: ProblemTables) -> None:
        self._tables = tables
        self._gradients = tables.gradients
        self._known: dict[tuple[int, ...], LiveRange] = {}

    def of(self, t: int, code: int, use: int, rerun: int, read: int, last: int) -> LiveRange:
        """Returns the live range of tensor ``t``; the other arguments are the module's data."""
        if use < NEVER:
            if code < FIRST_CODEC:
                use = 0  # when it is first needed matters for what is decoded then
            if code != RECOMPUTED and t not in self._gradients:
                rerun = NEVER  # leaves no new value
        key = (t, code, use, rerun, read, last)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[key] = live_range(self._tables, *key)
        return found


def live_range(tables: ProblemTables, t: int, code: int, use: int, rerun: int, read: int, last: int) -> LiveRange:
    """Computes the live range of tensor ``t``; the other arguments are the module's data."""
    slot, in_group = last // 2, last % 2 == 0
    death = slot if in_group else slot + 1  # of what is alive in the backward pass
    used = use < NEVER
    encoded = used and code >= FIRST_CODEC
    kept = used and code != RECOMPUTED
    intervals = [*_forward_interval(tables, t, read, death if kept and not encoded else read + 1)]
    begin = NEVER
    if encoded:
        begin = tables.slot(use)
        intervals.append((read + 1, begin, tables.option(t, code).encoded_bytes))
    recomputed = remakes(tables, t, kept=kept, rerun=rerun)
    if recomputed:
        begin = min(begin, tables.slot(rerun))
    stays = t in tables.gradients and (recomputed or encoded)
    if begin < NEVER and (stays or begin < death):
        intervals.append((begin, tables.n_slots if stays else death, tables.size_bytes[t]))
    group_death = slot if in_group and not stays and t not in tables.held else -1
    steps = _steps_of(intervals, tables.n_slots)
    if not encoded:
        return LiveRange(steps, group_death=group_death)
    option = tables.option(t, code)
    error2 = 0.0 if option.lossless else option.error**2
    seconds = option.encode_s + option.decode_s
    return LiveRange(steps, code, read + 1, begin, group_death, seconds, not option.lossless, error2)


def remakes(tables: ProblemTables, t: int, *, kept: bool, rerun: int) -> bool:
    """Whether a rerun of its op leaves a new value of ``t``: there is none yet, or the caller gets it."""
    return rerun < NEVER and tables.producer[t] not in tables.fused_at and (not kept or t in tables.gradients)


def _forward_interval(tables: ProblemTables, t: int, read: int, end: int) -> Iterator[Interval]:
    """Yields where the value made in the forward pass is alive, or where it no longer is if every plan makes it."""
    if read < 0:
        return
    end = max(end, read + 1)
    if t in tables.mutated:
        end = max(end, tables.n_forward + 1)
    if t in tables.held:
        end = tables.n_slots
    producer, size = tables.producer[t], tables.size_bytes[t]
    if producer in tables.optional:
        yield producer + 1, end, size
    else:
        yield end, tables.n_slots, -size


def _steps_of(intervals: Iterable[Interval], n_slots: int) -> tuple[tuple[int, int], ...]:
    steps: dict[int, int] = {}
    for begin, end, size in intervals:
        if begin < end:
            steps[begin] = steps.get(begin, 0) + size
            if end < n_slots:
                steps[end] = steps.get(end, 0) - size
    return tuple(steps.items())
