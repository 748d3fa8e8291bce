"""Program points: the instructions of any schedule, named so that a row made for one plan holds for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Kind, Schedule


@dataclass(frozen=True)
class ProgramPoint:
    """Names an instruction of any schedule by what surrounds it.

    Attributes:
        forward: whether it belongs to the forward pass.
        op: the forward op that runs or has just run, or the backward op that runs next.
        rerun: in backward, the forward op about to be recomputed; the number of forward ops after all of these.
        tensor: the tensor being encoded or decoded; -1 for the op itself.
    """

    forward: bool
    op: int
    rerun: int
    tensor: int


def program_points_of(problem: Problem, schedule: Schedule) -> list[ProgramPoint]:
    """Returns the program point of each instruction of ``schedule``."""
    program_points: list[ProgramPoint] = []
    at = 0
    for instruction in schedule.instructions[: schedule.n_forward]:
        encode = instruction.kind is Kind.ENCODE
        at = at if encode else instruction.op
        program_points.append(ProgramPoint(True, at, 0, instruction.op if encode else -1))
    end = len(problem.forward)
    position, rerun = len(problem.backward), end
    behind: list[ProgramPoint] = []
    for instruction in reversed(schedule.instructions[schedule.n_forward :]):
        if instruction.kind is Kind.DECODE:
            # One that a rerun waits for is followed by it; the others stand after all reruns.
            waits = rerun < end and instruction.op in problem.forward[rerun].inputs
            behind.append(ProgramPoint(False, position, rerun if waits else end, instruction.op))
            continue
        if instruction.kind is Kind.RERUN:
            rerun = instruction.op
        else:
            position, rerun = instruction.op, end
        behind.append(ProgramPoint(False, position, rerun, -1))
    return program_points + behind[::-1]
