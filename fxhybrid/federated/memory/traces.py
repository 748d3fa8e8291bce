"""Available memory over time: the trace type and its file format.

The file is JSON lines. The first is the header, each other one ``[t_s, available_bytes]``, t_s rising.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxhybrid.errors import InvalidArgument

FORMAT = "fxhybrid-memory-trace"
VERSION = 1


@dataclass(frozen=True, eq=False)
class MemoryTrace:
    """Holds readings of one device's available memory.

    Attributes:
        device: its name.
        total_bytes: its physical memory, or its limit.
        t_s: seconds since the start, strictly rising. Shape ``(n,)``.
        available_bytes: one reading for each of ``t_s``. Shape ``(n,)``.
        source: ``"generated"`` or ``"recorded"``.
        details: whatever else the header should say (seed, machine).
    """

    device: str
    total_bytes: int
    t_s: NDArray[np.float64]
    available_bytes: NDArray[np.int64]
    source: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.t_s.ndim != 1 or self.t_s.shape != self.available_bytes.shape:
            raise InvalidArgument("a trace needs one reading per time, both one-dimensional")
        if not np.all(np.isfinite(self.t_s)) or np.any(np.diff(self.t_s) <= 0):
            raise InvalidArgument("the times of a trace must be finite and strictly rising")
        if np.any(self.available_bytes < 0):
            raise InvalidArgument("available bytes cannot be negative")

    def minimum_bytes(self, start_s: float, end_s: float) -> int | None:
        """Returns the lowest reading in [start_s, end_s); None if there is none."""
        first, last = np.searchsorted(self.t_s, (start_s, end_s))
        return int(self.available_bytes[first:last].min()) if first < last else None

    def header(self) -> dict[str, Any]:
        """Makes the first line of the file."""
        own = {"device": self.device, "total_bytes": self.total_bytes, "source": self.source, "details": self.details}
        return {"format": FORMAT, "version": VERSION, **own}

    def save(self, path: Path) -> None:
        """Writes the file."""
        pairs = zip(self.t_s.tolist(), self.available_bytes.tolist(), strict=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in chain([self.header()], pairs))

    @staticmethod
    def load(path: Path) -> MemoryTrace:
        """Reads a file; a last line that was cut off while being written is left out.

        Raises:
            InvalidArgument: it is no trace file, or a line inside it is damaged.
        """
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            header = json.loads(lines[0])
            if header["format"] != FORMAT or header["version"] != VERSION:
                raise InvalidArgument(f"{path}: not a {FORMAT} file of version {VERSION}")
            pairs = [_reading(line) for line in lines[1:-1]]
            if len(lines) > 1:
                pairs += _last_reading(lines[-1])
            return MemoryTrace(
                header["device"],
                int(header["total_bytes"]),
                np.array([t for t, _ in pairs], dtype=np.float64),
                np.array([b for _, b in pairs], dtype=np.int64),
                header["source"],
                dict(header["details"]),
            )
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{path}: not a readable memory trace: {error}") from error


def _reading(line: str) -> tuple[float, int]:
    t_s, available_bytes = json.loads(line)
    return float(t_s), int(available_bytes)


def _last_reading(line: str) -> list[tuple[float, int]]:
    try:
        return [_reading(line)]
    except (TypeError, ValueError):
        return []
