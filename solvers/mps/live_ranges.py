"""Who lives from where to where in the present state, and how high decodings and reruns reach.

``Lives`` only answers; ``Footprints`` changes the state and keeps what follows from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fxhybrid.ir.problem import CodecOption, Problem
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, NEVER, RECOMPUTED, SAVED, Grid, State

NO_GROUP = -NEVER
MAX_KNOWN = 1 << 17  # lives remembered
Interval = tuple[int, int, int]


class Life(NamedTuple):
    """Where a tensor is in one state.

    Attributes:
        steps: slots from which on more bytes, or fewer if negative, are alive right before the slots' own ops. Where
            every plan makes the tensor in the forward pass, that it comes is no step: ``base_live`` has that.
        code: the codec's code if it is stored encoded, else SAVED.
        encoded_at: slot before which it is encoded, or -1.
        decoded_at: slot before which it is decoded, or -1.
        group_death: slot whose group reads it last, or -1.
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


UNBORN = Life()


class Lives(Grid):
    """The present state of one problem.

    Attributes:
        state: the present codes.
        use: per tensor, backward op before which it is first needed, or NEVER.
        rerun: per forward op, backward op before which it runs again, or NEVER.
        last_use: per tensor, slot of its last backward use, or -1.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        count = len(problem.tensors)
        self.state: State = self.default.copy()
        self.use = [NEVER] * count
        self.rerun = [NEVER] * self.n_forward
        self.last_use = [-1] * count
        self._runs = [i not in self.optional for i in range(self.n_forward)]
        self._lives = [UNBORN] * count
        self._known: dict[tuple[int, ...], Life] = {}
        # of the groups, by slot: tensors that are encoded or decoded, and ~o for an op o that runs again
        self._members: defaultdict[int, set[int]] = defaultdict(set)

    def option(self, t: int, code: int) -> CodecOption:
        """The codec option that ``code`` stands for."""
        return self.problem.tensors[t].codecs[code - FIRST_CODEC]

    def _life(self, t: int, read: int, last: int) -> Life:
        """Where ``t`` is alive, from its ``_last_uses``; remembered, as a search comes by the same again and again."""
        code, use, rerun = self.state[t], self.use[t], self.rerun[self.producer[t]]
        if use < NEVER:
            if code < FIRST_CODEC:
                use = 0  # when it is first needed matters for what is decoded then
            if code != RECOMPUTED and t not in self.gradients:
                rerun = NEVER  # leaves no new value
        key = (t, code, use, rerun, read, last)  # it is made in the forward pass if it is read there
        life = self._known.get(key)
        if life is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            life = self._known[key] = self._new_life(t, read, last // 2, last % 2 == 0)
        return life

    def _new_life(self, t: int, read: int, last: int, in_group: bool) -> Life:
        producer, size, code = self.producer[t], self.sizes[t], self.state[t]
        used = self.use[t] < NEVER
        encoded = used and code >= FIRST_CODEC
        kept = used and code != RECOMPUTED
        death = last if in_group else last + 1  # of what is alive in the backward pass
        intervals: list[Interval] = []
        if self._runs[producer]:
            end = max(read + 1, death) if kept and not encoded else read + 1
            if t in self.mutated:
                end = max(end, self.n_forward + 1)
            if t in self.held:
                end = self.n_slots
            if producer in self.optional:
                intervals.append((producer + 1, end, size))
            else:
                intervals.append((end, self.n_slots, -size))
        first = self.slot(self.use[t]) if encoded else NEVER
        if encoded:
            intervals.append((read + 1, first, self.option(t, code).encoded_bytes))
        again = self._made_again(t)
        if again:
            first = min(first, self.slot(self.rerun[producer]))
        stays = t in self.gradients and (again or encoded)
        if first < NEVER and (stays or first < death):
            intervals.append((first, self.n_slots if stays else death, size))
        group_death = last if in_group and not stays and t not in self.held else -1
        steps = self._steps_of(intervals)
        if not encoded:
            return Life(steps, group_death=group_death)
        option = self.option(t, code)
        error2 = 0.0 if option.lossless else option.error**2
        seconds = option.encode_s + option.decode_s
        return Life(steps, code, read + 1, first, group_death, seconds, not option.lossless, error2)

    def _steps_of(self, intervals: Iterable[Interval]) -> tuple[tuple[int, int], ...]:
        steps: dict[int, int] = {}
        for begin, end, size in intervals:
            if begin < end:
                steps[begin] = steps.get(begin, 0) + size
                if end < self.n_slots:
                    steps[end] = steps.get(end, 0) - size
        return tuple(steps.items())

    def _made_again(self, t: int) -> bool:
        """Whether a rerun of its op leaves a new value of ``t``: there is none yet, or the caller gets it."""
        o = self.producer[t]
        kept = self.use[t] < NEVER and self.state[t] != RECOMPUTED
        return self.rerun[o] < NEVER and o not in self.fused_at and (not kept or t in self.gradients)

    def _outlives(self, t: int, slot: int) -> bool:
        """Whether a value of ``t`` made before a slot's own op is read after that."""
        return self.last_use[t] >= slot or t in self.gradients

    def _last_uses(self, t: int) -> tuple[int, int]:
        """The last uses of ``t``.

        Returns:
            The slot of the last forward use, and twice that of the last backward use, one more if its own op reads
            ``t`` and not the group; -1 for no use.
        """
        read, last, rerun = self.base_read[t], self.base_last[t], self.rerun
        for o in self.readers[t]:
            if rerun[o] < NEVER:
                use = 2 * (self.n_forward + 1 + rerun[o]) + (o in self.fused_at)
                if use > last:
                    last = use
        for o in self.optional_users[t]:
            if self._runs[o] and o > read:
                read = o
        return read, last

    def _group_height(self, slot: int) -> int:
        """The highest point of the instructions before a slot's own op, relative to the height after them."""
        members = self._members[slot]
        if not members:
            return NO_GROUP
        level, highest = 0, NO_GROUP
        for top, change in self._encodings(members) if slot <= self.n_forward else self._instructions(slot, members):
            highest = max(highest, level + top)
            level += change
        return highest - level

    def _encodings(self, members: set[int]) -> Iterator[tuple[int, int]]:
        for t in sorted(members):
            option = self.option(t, self.state[t])
            freed = 0 if t in self.mutated else self.sizes[t]
            yield max(option.encode_alloc_peak_bytes, option.encoded_bytes), option.encoded_bytes - freed

    def _instructions(self, slot: int, members: set[int]) -> Iterator[tuple[int, int]]:
        """Per decoding and rerun of a slot: how high it reaches, and what it leaves behind."""
        pending = {t for t in members if t >= 0}
        order = sorted([~o for o in members if o < 0])
        last_reader = {t: o for o in order for t in self.read[o] if self._lives[t].group_death == slot}
        left = dict.fromkeys(order, 0)
        for t, o in last_reader.items():
            left[o] -= self.sizes[t]
        for o in order:
            if pending:
                for t in self.read[o]:
                    if t in pending:
                        pending.discard(t)
                        yield self._decoding(t)
            for t in self.made[o]:
                if self._outlives(t, slot) and self._made_again(t):
                    left[o] += self.sizes[t]
            yield self.rerun_top[o], left[o]
        for t in sorted(pending):
            yield self._decoding(t)

    def _decoding(self, t: int) -> tuple[int, int]:
        option = self.option(t, self.state[t])
        return max(option.decode_alloc_peak_bytes, self.sizes[t]), self.sizes[t] - option.encoded_bytes
