"""Memory over a step, by what it is spent on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxhybrid.explain.planned_step import PlannedStep, Simulated
from fxhybrid.ir.schedule import Value

GRADIENTS, TANGENTS, PASSING = "gradients", "gradients of outputs", "gradients of activations"
ENCODED, WORKSPACE, OTHERS = "encoded", "workspaces", "other modules"
MAX_MODULES = 7  # that have a colour of their own
DOMINANT = 0.6  # share of the kept bytes above which a part of the model is split further

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MemoryTimeline:
    """Holds the bytes of each kind over the instructions of one step.

    Attributes:
        kinds: from the bottom of a stack to its top.
        bytes_of: per kind, bytes while each instruction runs; they sum up to the simulated height.
        end_s: seconds from the start of the step to the end of each instruction.
        forward_s: when the forward pass ends.
        peak_at: the instruction at the peak.
        peak_bytes: highest point.
    """

    kinds: tuple[str, ...]
    bytes_of: dict[str, Bytes]
    end_s: npt.NDArray[np.float64]
    forward_s: float
    peak_at: int
    peak_bytes: int


def memory_timelines(step: PlannedStep) -> tuple[MemoryTimeline, MemoryTimeline]:
    """Splits the memory of the unmodified and of the planned step by kind; both have the same kinds."""
    modules = _modules(step)
    found = [_bytes_of(step, simulated, modules) for simulated in (step.unmodified, step.planned)]
    seen = list(dict.fromkeys([*step.resident, GRADIENTS, TANGENTS, PASSING, *modules.values(), ENCODED, WORKSPACE]))
    kinds = tuple(kind for kind in seen if any(kind in one and one[kind].any() for one in found))
    return _timeline(step.unmodified, kinds, found[0]), _timeline(step.planned, kinds, found[1])


def _timeline(simulated: Simulated, kinds: tuple[str, ...], found: dict[str, Bytes]) -> MemoryTimeline:
    schedule, timeline = simulated.schedule, simulated.timeline
    n = len(schedule.instructions)
    end_s = np.cumsum(np.fromiter((i.seconds for i in schedule.instructions), np.float64, n))
    forward_s = float(end_s[schedule.n_forward - 1]) if schedule.n_forward else 0.0
    nothing = np.zeros(n, np.int64)
    by_kind = {kind: found.get(kind, nothing) for kind in kinds}
    return MemoryTimeline(kinds, by_kind, end_s, forward_s, timeline.peak_at, timeline.peak_bytes)


def _bytes_of(step: PlannedStep, simulated: Simulated, modules: dict[str, str]) -> dict[str, Bytes]:
    """Returns bytes per kind while each instruction runs."""
    schedule, timeline = simulated.schedule, simulated.timeline
    n = len(schedule.instructions)
    change: dict[str, Bytes] = {}
    for value, birth, death in zip(schedule.values, timeline.birth, timeline.death, strict=True):
        steps = change.setdefault(
            _kind(step, value, int(birth) < schedule.n_forward, modules), np.zeros(n + 2, np.int64)
        )
        steps[birth] += value.size_bytes
        steps[death + 1] -= value.size_bytes
    found = {kind: np.cumsum(steps)[:n] for kind, steps in change.items()}
    found |= {kind: np.full(n, size, np.int64) for kind, size in step.resident.items()}
    tangents = np.zeros(n, np.int64)
    tangents[schedule.n_forward :] = step.problem.backward_base_bytes - step.problem.forward_base_bytes
    found[TANGENTS] = tangents
    found[WORKSPACE] = timeline.during_bytes - sum(found.values(), np.zeros(n, np.int64))
    return found


def _kind(step: PlannedStep, value: Value, in_forward: bool, modules: dict[str, str]) -> str:
    if value.encoded:
        return ENCODED
    made_by_forward = value.tensor in step.problem.producer
    if made_by_forward:
        return modules[step.tensors[value.tensor].module]
    return GRADIENTS if value.tensor in step.problem.gradients and not in_forward else PASSING


def _modules(step: PlannedStep) -> dict[str, str]:
    """Names the part of the model that each module path is shown as; small parts become ``OTHERS``.

    Paths are cut at the first level at which no part keeps most of what the unmodified step keeps.
    """
    kept: Counter[str] = Counter()
    for number in step.unmodified.schedule.stored:
        value = step.unmodified.schedule.values[number]
        kept[step.tensors[value.tensor].module] += value.size_bytes
    paths = list(dict.fromkeys(place.module for place in step.tensors))
    for depth in range(1, 2 + max(path.count(".") for path in paths)):
        parts: Counter[str] = Counter()
        for path, size in kept.items():
            parts[_cut(path, depth)] += size
        if max(parts.values(), default=0) <= DOMINANT * kept.total():
            break
    shown = {name for name, _ in parts.most_common(MAX_MODULES)}
    named = {path: _cut(path, depth) for path in paths}
    named = {path: name if name in shown else OTHERS for path, name in named.items()}
    return dict(sorted(named.items(), key=lambda item: item[1] == OTHERS))


def _cut(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth]) or "the model"
