"""Keeps measured costs of operator calls on disk: one JSON file per device, which several processes may write to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class OpCost:
    """Holds seconds of one run and the allocator's peak rise during it, outputs included.

    Attributes:
        seconds: smallest time seen.
        alloc_peak_bytes: most bytes allocated at once.
        estimated: whether both follow from the sizes of inputs and outputs, since the operator takes no synthetic ones.
    """

    seconds: float
    alloc_peak_bytes: int
    estimated: bool = False


def cost_path(device: str, folder: Path) -> Path:
    """Returns the file for a device."""
    method = "caches filled with other data"  # in the name: times taken another way do not mix
    return folder / f"profile-{hashlib.sha256(f'{device}, {method}'.encode()).hexdigest()[:16]}.json"


def read_costs(path: Path) -> dict[str, OpCost]:
    """Reads what ``write_costs`` kept; what is absent, cut off or malformed is left out, and measured again."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = raw.items() if isinstance(raw, dict) else ()
    return {key: OpCost(float(value[0]), value[1]) for key, value in entries if _is_cost(value)}


def _is_cost(value: Any) -> bool:
    if not isinstance(value, list) or [type(part) in (int, float) for part in value] != [True, True]:
        return False
    seconds, rise_bytes = value
    return math.isfinite(seconds) and seconds >= 0 and type(rise_bytes) is int and rise_bytes >= 0


def write_costs(path: Path, costs: Mapping[str, OpCost]) -> None:
    """Adds measured costs to those that other processes have written meanwhile.

    A folder that cannot be written to or a full disk costs a new measurement next time, nothing else.
    """
    measured = {key: cost for key, cost in costs.items() if not cost.estimated}
    merged = {**read_costs(path), **measured}
    text = json.dumps({key: (cost.seconds, cost.alloc_peak_bytes) for key, cost in merged.items()})
    with contextlib.suppress(OSError):
        replace_file(path, text)


def replace_file(path: Path, text: str) -> None:
    """Writes a file at once, so that others who read it find the old or the new text.

    Raises:
        OSError: the folder or the disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.stem}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
