"""Readings of one device's available memory, kept small at every time scale.

Level k cuts time into blocks of ``BASE_S * 2**k`` seconds and keeps the first and the lowest reading of each of the
last ``CAPACITY`` blocks. So a horizon of any length finds blocks of about an eighth of it, which reach back over some
hundred horizons, and a device takes at most 24 KiB per level whatever it reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BASE_S = 5.0
CAPACITY = 1024
_TOP_LEVEL = 14  # blocks of 23 hours
_BLOCKS_PER_HORIZON = 8
_LONGEST = 4


@dataclass(frozen=True)
class Windows:
    """Holds past stretches of one horizon's length, one block apart, oldest first; all arrays ``(n,)``.

    Attributes:
        starts: the reading that a forecast would have seen at the stretch's start.
        trailing: the lowest reading over one horizon up to the start.
        minima: the lowest reading over the stretch: what that forecast should have stayed under.
        independent: about how many stretches lie side by side without overlap.
    """

    starts: Floats
    trailing: Floats
    minima: Floats
    independent: float


class _Level:
    """Keeps closed blocks of one length, in a buffer that grows up to its capacity, and the block still open."""

    def __init__(self) -> None:
        self.closed = np.empty((3, 16))  # number of the block, first reading, lowest reading
        self.n = 0
        self.open: list[float] | None = None

    def add(self, block: int, first: float, low: float) -> list[float] | None:
        """Puts a reading, or a finished block of the level below, into its block; returns the block this closes."""
        done = None
        if self.open is None or block > self.open[0]:
            done, self.open = self.open, [block, first, low]
            if done is not None:
                self.close(done)
        else:
            self.open[2] = min(self.open[2], low)
        return done

    def close(self, block: list[float]) -> None:
        if self.n == self.closed.shape[1]:
            if self.n < 2 * CAPACITY:
                self.closed = np.concatenate([self.closed, np.empty_like(self.closed)], axis=1)
            else:
                self.closed[:, :CAPACITY] = self.closed[:, CAPACITY:].copy()
                self.n = CAPACITY
        self.closed[:, self.n] = block
        self.n += 1

    def recent(self) -> Floats:
        """Returns the last ``CAPACITY`` closed blocks. Shape ``(3, n)``."""
        return self.closed[:, max(0, self.n - CAPACITY) : self.n]


class ReadingHistory:
    """Takes readings in order of time and returns past stretches of any length."""

    def __init__(self) -> None:
        self._levels = [_Level()]
        self.last_s = -math.inf
        self.last_bytes = 0.0

    def observe(self, t_s: float, available_bytes: float) -> None:
        """Adds a reading that is not older than the last one."""
        self.last_s, self.last_bytes = t_s, available_bytes
        block, first, low = math.floor(t_s / BASE_S), available_bytes, available_bytes
        for k in range(_TOP_LEVEL + 1):
            if k == len(self._levels):
                self._levels.append(_Level())
            done = self._levels[k].add(block, first, low)
            if done is None:
                return
            block, first, low = int(done[0]) // 2, done[1], done[2]

    def trailing_minimum(self, start_s: float) -> float:
        """Returns the lowest reading since about ``start_s``, the last reading included."""
        lowest = self.last_bytes
        level = self._finest_since(start_s)
        for k in range(level + 1):
            own = self._levels[k]
            if own.open is not None and own.open[0] >= start_s / _length_s(k) - 1:
                lowest = min(lowest, own.open[2])
        blocks = self._levels[level].recent()
        lows = blocks[2, blocks[0] >= start_s / _length_s(level) - 0.5]
        return min(lowest, float(lows.min())) if lows.size else lowest

    def windows(self, horizon_s: float) -> Windows:
        """Collects what happened after (and before) past times, over stretches of ``horizon_s``."""
        level = self._level_for(horizon_s)
        length_s = _length_s(level)
        # a block wider than a quarter of the horizon: its first reading may lie anywhere in it
        width = math.ceil(horizon_s / length_s) + (length_s > horizon_s / 4)
        numbers, firsts, lows = self._levels[level].recent()
        if numbers.size and numbers[-1] - numbers[0] > _LONGEST * CAPACITY:  # long silence: forget what was before
            numbers, firsts, lows = (
                row[numbers > numbers[-1] - _LONGEST * CAPACITY] for row in (numbers, firsts, lows)
            )
        n = int(numbers[-1] - numbers[0]) + 1 if numbers.size else 0
        if n <= width:
            return Windows(np.empty(0), np.empty(0), np.empty(0), 0.0)
        at = (numbers - numbers[0]).astype(np.intp)
        start, low = np.full(n, np.nan), np.full(n + width, np.inf)
        start[at], low[width + at] = firsts, lows
        seen = np.concatenate([[0], np.cumsum(np.isfinite(low[width:]))])
        minima_before = sliding_window_view(low, width).min(axis=1)  # of the blocks [i - width, i)
        minima = minima_before[width:]
        count = len(minima)
        covered = 2 * (seen[width:] - seen[:-width]) >= width
        good = covered & np.isfinite(start[:count])
        starts = start[:count][good]
        trailing = np.minimum(minima_before[:count][good], starts)
        return Windows(starts, trailing, minima[good], int(covered.sum()) / width if good.any() else 0.0)

    def _level_for(self, horizon_s: float) -> int:
        """Finds the widest blocks that divide the horizon well; wider ones where readings are rare."""
        level = min(_finest(horizon_s), len(self._levels) - 1)
        while level + 1 < len(self._levels):
            numbers = self._levels[level].recent()[0]
            if numbers.size > 1 and np.median(np.diff(numbers)) <= 2:
                break
            level += 1
        return level

    def _finest_since(self, start_s: float) -> int:
        return min(_finest(max(self.last_s - start_s, 0.0)), len(self._levels) - 1)

    def to_state(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        levels = [{"closed": level.recent().tolist(), "open": level.open} for level in self._levels]
        return {"last": [self.last_s, self.last_bytes], "levels": levels}

    @staticmethod
    def from_state(state: dict[str, Any]) -> ReadingHistory:
        """Restores the history that gave ``state``."""
        history = ReadingHistory()
        history.last_s, history.last_bytes = state["last"]
        history._levels = []
        for saved in state["levels"]:
            level = _Level()
            for block in zip(*saved["closed"], strict=True):
                level.close(list(block))
            level.open = None if saved["open"] is None else list(saved["open"])
            history._levels.append(level)
        return history


def _length_s(level: int) -> float:
    return BASE_S * float(2**level)


def _finest(horizon_s: float) -> int:
    """Finds the level with the widest blocks of at most an eighth of the horizon."""
    blocks = horizon_s / (_BLOCKS_PER_HORIZON * BASE_S)
    return min(max(0, math.floor(math.log2(blocks))), _TOP_LEVEL) if blocks >= 1 else 0
