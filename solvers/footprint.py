"""The heights of a plan on a fixed grid, fast enough to ask thousands of times.

``Footprints.measure`` gives the very peak and added time of ``lower`` + ``simulate`` without building a
schedule. Its grid has one slot per op (forward, then backward); encodings count to the slot of the op before
them, decodings and recomputations to the slot of the backward op after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxhybrid.plan import RECOMPUTE, SAVE, Action, Compress
from fxhybrid.solvers.grid import FIRST_CODEC, RECOMPUTED, SAVED, Grid, Ints, State


@dataclass(frozen=True)
class Footprint:
    """What one state costs.

    Attributes:
        peak_bytes: highest point of the step.
        added_s: seconds beyond running every op once.
        error2: sum of squared lossy errors.
        height: bytes per slot of the grid, the highest within the slot.
        needed: per tensor, whether the backward program wants it, directly or through a chain.
        use: per tensor, slot of its first backward use (there it is decoded or recomputed), or -1.
        last_use: per tensor, slot of its last backward use, or -1.
        last_read: per tensor, slot of its last forward use.
        reruns: forward ops that run again (or only) in the backward pass.
    """

    peak_bytes: int
    added_s: float
    error2: float
    height: Ints
    needed: bytearray
    use: list[int]
    last_use: list[int]
    last_read: list[int]
    reruns: frozenset[int]


class Footprints(Grid):
    """Measures states of one problem."""

    def actions(self, state: State, needed: bytearray) -> dict[int, Action]:
        """The state as actions; defaults and what backward does not want are left out."""
        named: dict[int, Action] = {}
        for t in self.problem.candidates:
            code = state[t]
            if needed[t] and code != self.default[t]:
                named[t] = (
                    (SAVE, RECOMPUTE)[code]
                    if code < FIRST_CODEC
                    else Compress(self.problem.tensors[t].codecs[code - FIRST_CODEC].codec)
                )
        return named

    def measure(self, state: State) -> Footprint | None:
        """The footprint of ``state``; None if an op would be recomputed from a lossy tensor."""
        run = _Measurement(self, state)
        return run.finish() if run.walk() else None


class _Measurement:
    def __init__(self, base: Grid, state: State) -> None:
        self.base = base
        self.state = state
        self.seconds = base.base_s
        self.error2 = 0.0
        self.needed = bytearray(len(state))
        self.stored: list[int] = []
        self.recomputed: list[int] = []
        # dynamic backward instructions: count per group, then one entry each
        self.rows: list[tuple[int, int]] = []  # position, rise
        self.values: list[tuple[int, int, int]] = []  # tensor, birth position, whether reads go to it
        self.dynamic_last: dict[int, int] = {}  # position of the last rerun that reads a tensor
        self.dynamic_group: dict[int, int] = {}  # its group
        self.first_group: dict[int, int] = {}  # first group that makes or reads a tensor
        self.reruns: set[int] = set()

    def walk(self) -> bool:
        """Finds what is stored and what is recomputed; False if the state is invalid."""
        state, forward, producer = self.state, self.base.problem.forward, self.base.producer
        tensors = self.base.problem.tensors
        lossy_sources: set[int] = set()
        stack = list(self.base.roots)
        for t in stack:
            self.needed[t] = 1
        while stack:
            t = stack.pop()
            code = state[t]
            if code != RECOMPUTED:
                self.stored.append(t)
                if code >= FIRST_CODEC and not tensors[t].codecs[code - FIRST_CODEC].lossless:
                    self.error2 += tensors[t].codecs[code - FIRST_CODEC].error ** 2
                    lossy_sources.add(t)
                continue
            op = forward[producer[t]]
            if not op.recomputable:
                return False
            self.recomputed.append(t)
            for s in op.inputs:
                if not self.needed[s]:
                    self.needed[s] = 1
                    stack.append(s)
        return not lossy_sources or all(lossy_sources.isdisjoint(forward[producer[t]].inputs) for t in self.recomputed)

    def _forward_reads(self) -> tuple[list[int], Ints]:
        """Last forward read per tensor and which forward ops run."""
        base, forward = self.base, self.base.problem.forward
        last_read = base.base_read.copy()
        runs = np.ones(base.n_forward, np.int64)
        wanted = set(self.stored)
        for i in base.optional:
            op = forward[i]
            if wanted.isdisjoint(op.outputs):
                runs[i] = 0
                continue
            wanted.update(op.inputs)
            self.seconds += op.seconds
            for t in (*op.inputs, *op.outputs):
                if last_read[t] < i:
                    last_read[t] = i
        return last_read, runs

    def finish(self) -> Footprint:
        """Emits the dynamic instructions and adds everything up."""
        base, state = self.base, self.state
        last_read, runs = self._forward_reads()
        encoded = sorted((last_read[t], t) for t in self.stored if state[t] >= FIRST_CODEC)
        after = np.bincount([i for i, _ in encoded], minlength=base.n_forward) if encoded else None
        forward_at = np.arange(base.n_forward)
        if after is not None:
            forward_at = forward_at + np.cumsum(after) - after
        start = base.n_forward + len(encoded)
        encode_at: dict[int, int] = {}
        previous, offset = -1, 0
        for i, t in encoded:
            offset = offset + 1 if i == previous else 1
            previous = i
            encode_at[t] = int(forward_at[i]) + offset
        groups = self._groups(start, encode_at)
        backward_at = start + np.arange(len(base.problem.backward)) + np.cumsum(groups)
        n = start + len(backward_at) + int(groups.sum())
        during = self._during(n, start, forward_at, backward_at, last_read, runs, encode_at)
        begins = np.concatenate([forward_at, backward_at - groups])
        height = np.maximum.reduceat(during, begins) if n else np.zeros(0, np.int64)
        peak = int(height.max()) if n else base.problem.resident_bytes
        added_s = max(self.seconds, 0.0)
        use, last_use = self._uses()
        reruns = frozenset(self.reruns)
        return Footprint(peak, added_s, self.error2, height, self.needed, use, last_use, last_read, reruns)

    def _groups(self, start: int, encode_at: dict[int, int]) -> Ints:
        """Materialises group by group, in the order of ``lower``; gives the instructions per group."""
        base = self.base
        counts = np.zeros(len(base.problem.backward), np.int64)
        wanted: dict[int, list[int]] = {}
        for t in self.needed_roots():
            wanted.setdefault(base.problem.backward_reads[t], []).append(t)
        self.available = {t for t in self.stored if t not in encode_at}
        self.decode_at: dict[int, int] = {}
        for p in sorted(wanted):
            missing = [t for t in wanted[p] if t not in self.available]
            if missing:
                first = start + p + len(self.rows)
                self._materialise(missing, encode_at, p, first - len(self.rows))
                counts[p] = len(self.rows) + start + p - first
        return counts

    def needed_roots(self) -> list[int]:
        """Tensors that backward ops read and that are not simply kept."""
        return [t for t in self.base.roots if self.state[t] != SAVED]

    def _materialise(self, wanted: list[int], encode_at: dict[int, int], p: int, origin: int) -> None:
        base, forward, available = self.base, self.base.problem.forward, self.available
        reruns: set[int] = set()
        decodes: set[int] = set()
        stack = wanted
        while stack:
            t = stack.pop()
            if t in available or t in decodes:
                continue
            if t in encode_at:
                decodes.add(t)
            elif (op_index := base.producer[t]) not in reruns:
                reruns.add(op_index)
                stack.extend(forward[op_index].inputs)
        pending = set(decodes)
        for i in sorted(reruns):
            op = forward[i]
            for t in op.inputs:
                if t in pending:
                    pending.discard(t)
                    self._decode(t, p, origin)
            at = origin + len(self.rows)
            for t in op.inputs:
                self.dynamic_last[t] = at
                self.dynamic_group[t] = p
                self.first_group.setdefault(t, p)
            for t in op.outputs:
                fresh = t not in available and t not in encode_at
                self.values.append((t, at, fresh))
                if fresh:
                    available.add(t)
                    self.first_group.setdefault(t, p)
            self.rows.append((at, op.rise_bytes))
            self.seconds += 0.0 if i in base.problem.fused_masks else op.seconds
            self.reruns.add(i)
        for t in sorted(pending):
            self._decode(t, p, origin)
        available |= decodes

    def _decode(self, t: int, p: int, origin: int) -> None:
        option = self.base.problem.tensors[t].codecs[self.state[t] - FIRST_CODEC]
        at = origin + len(self.rows)
        self.rows.append((at, option.decode_rise_bytes))
        self.values.append((t, at, True))
        self.seconds += option.encode_s + option.decode_s
        self.decode_at[t] = at
        self.first_group.setdefault(t, p)

    def _during(
        self,
        n: int,
        start: int,
        forward_at: Ints,
        backward_at: Ints,
        last_read: list[int],
        runs: Ints,
        encode_at: dict[int, int],
    ) -> Ints:
        base, problem = self.base, self.base.problem
        ends = np.append(backward_at, n)
        death_of = forward_at[np.array(last_read, np.int64)] if base.n_forward else ends[:0]
        dynamic = np.full(len(last_read), -1, np.int64)
        dynamic[list(self.dynamic_last)] = list(self.dynamic_last.values())
        # index -1 (never read) falls on the trailing -1
        read = np.maximum(np.append(backward_at, -1)[base.last_run], dynamic)
        raw_stored = [t for t in self.stored if t not in encode_at]
        death_of[raw_stored] = np.maximum(death_of[raw_stored], read[raw_stored])
        death_of[list(encode_at)] = list(encode_at.values())
        mutated = [t for t in problem.mutations if base.producer[t] >= 0]
        death_of[mutated] = np.maximum(death_of[mutated], start - 1)
        death_of[[t for t in base.held if base.producer[t] >= 0]] = n
        read[list(base.gradients)] = n
        options = {t: problem.tensors[t].codecs[self.state[t] - FIRST_CODEC] for t in encode_at}
        raw = base.size[base.forward_tensors] * runs[base.made_by] if base.n_forward else ends[:0]
        births = [
            forward_at[base.made_by],
            np.array(list(encode_at.values()), np.int64),
            backward_at[base.back_birth],
        ]
        deaths = [
            death_of[base.forward_tensors],
            np.array([self.decode_at.get(t, at) for t, at in encode_at.items()], np.int64),
            ends[base.back_death],
        ]
        sizes = [raw, np.array([o.encoded_bytes for o in options.values()], np.int64), base.back_size]
        if self.values:
            made_again, at, fresh = np.array(self.values, np.int64).T
            births.append(at)
            fresh = (fresh > 0) | (read[made_again] == n)
            deaths.append(np.where(fresh, np.maximum(read[made_again], at), at))
            sizes.append(base.size[made_again])
        birth, death, size = np.concatenate(births), np.concatenate(deaths), np.concatenate(sizes)
        change = np.bincount(birth + 1, size, n + 2) - np.bincount(death + 1, size, n + 2)
        before = np.cumsum(change)[:n].astype(np.int64) + problem.resident_bytes
        before[start:] += problem.tangent_bytes
        made = np.bincount(birth, size, n + 1)[:n].astype(np.int64)
        rise = np.zeros(n, np.int64)
        rise[forward_at] = base.forward_rise * runs
        rise[backward_at] = base.back_rise
        for t, place in encode_at.items():
            rise[place] = options[t].encode_rise_bytes
        if self.rows:
            places, rises = np.array(self.rows, np.int64).T
            rise[places] = rises
        during: Ints = before + np.maximum(rise, made)
        return during

    def _uses(self) -> tuple[list[int], list[int]]:
        """First and last backward slot of every needed tensor."""
        base = self.base
        needed = np.frombuffer(self.needed, np.uint8) > 0
        first, final = base.first_run.copy(), base.last_run.copy()
        groups = list(self.dynamic_group.values())
        again = list(self.dynamic_group)
        final[again] = np.maximum(final[again], groups)
        for t, p in self.first_group.items():
            if first[t] < 0 or p < first[t]:
                first[t] = p
        unused = ~needed | (first < 0)
        use, last_use = first + base.n_forward, final + base.n_forward
        use[unused] = last_use[unused] = -1
        return use.tolist(), last_use.tolist()
