"""Exact memory over time of a schedule, storage by storage.

Every other part trusts only this. A value is alive from the instruction that makes it to its last read; the
caller holds the outputs; gradients pile up to the end; while an instruction runs, the allocator is as high as
what was alive before it plus the measured rise of that instruction. A value that takes over the storage of one
that dies adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Schedule, lower

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Timeline:
    """Holds memory over the instructions of a schedule.

    Attributes:
        peak_bytes: highest point of the step, resident bytes included.
        peak_at: the instruction at the peak.
        during_bytes: the allocator's height while each instruction runs.
        birth: per value, the instruction that makes it.
        death: per value, the instruction after which it is gone.
        overhead_s: seconds beyond running every op once.
    """

    peak_bytes: int
    peak_at: int
    during_bytes: Bytes
    birth: Bytes
    death: Bytes
    overhead_s: float


def simulate(problem: Problem, schedule: Schedule) -> Timeline:
    """Adds up the timeline of ``schedule``; all sizes in bytes."""
    n = len(schedule.instructions)
    birth, death = _lifetimes(problem, schedule)
    size = np.fromiter((v.size_bytes for v in schedule.values), np.int64, len(schedule.values))
    change = np.zeros(n + 2, np.int64)
    np.add.at(change, birth + 1, size)
    np.add.at(change, death + 1, -size)
    before = np.cumsum(change)[:n]
    before[: schedule.n_forward] += problem.forward_base_bytes
    before[schedule.n_forward :] += problem.backward_base_bytes
    rise = np.fromiter((i.alloc_peak_bytes for i in schedule.instructions), np.int64, n)
    made = np.zeros(n, np.int64)
    np.add.at(made, birth, size)
    made[[position for position, _ in schedule.overwrites]] = 0
    during = before + np.maximum(rise, made)
    peak_at = int(during.argmax()) if n else 0
    peak_bytes = int(during[peak_at]) if n else problem.forward_base_bytes
    return Timeline(peak_bytes, peak_at, during, birth, death, schedule.overhead_s)


def simulate_actions(problem: Problem, actions: Actions) -> Timeline:
    """Adds up the timeline of the schedule that carries out ``actions``."""
    return simulate(problem, lower(problem, actions))


def _lifetimes(problem: Problem, schedule: Schedule) -> tuple[Bytes, Bytes]:
    n = len(schedule.instructions)
    birth = [0] * len(schedule.values)
    death = [0] * len(schedule.values)
    for position, instruction in enumerate(schedule.instructions):
        for value in instruction.writes:
            birth[value] = death[value] = position
        for value in instruction.reads:
            death[value] = position
    held, copied, gradients = set(problem.outputs), set(problem.mutations), set(problem.gradients)
    last_forward = schedule.n_forward - 1
    for value, made in enumerate(schedule.values):
        in_forward = birth[value] <= last_forward
        if made.encoded:
            continue
        if made.tensor in (held if in_forward else gradients):
            death[value] = n
        elif in_forward and made.tensor in copied:
            death[value] = max(death[value], last_forward)
    return np.asarray(birth, np.int64), np.asarray(death, np.int64)


def describe_peak(problem: Problem, schedule: Schedule, timeline: Timeline) -> str:
    """Names the instruction at the peak in words: ``backward convolution_backward.3``."""
    if not schedule.instructions:
        return "resident tensors"
    instruction = schedule.instructions[timeline.peak_at]
    if instruction.kind.value in ("encode", "decode"):
        return f"{instruction.kind.value} {problem.tensors[instruction.op].name}"
    if timeline.peak_at < schedule.n_forward:
        return f"forward {problem.forward[instruction.op]}"
    if instruction.kind.value == "rerun":
        return f"recompute {problem.forward[instruction.op]}"
    return f"backward {problem.backward[instruction.op]}"
