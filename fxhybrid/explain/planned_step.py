"""A plan beside the unmodified step: both schedules, and where in the model each tensor and op comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxhybrid.capture.joint_graph import Origin
from fxhybrid.capture.origins import LOSS, origins
from fxhybrid.ir.plan import Actions
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Kind, Schedule, lower
from fxhybrid.ir.simulator import Timeline, simulate
from fxhybrid.passes.storages import Layout
from fxhybrid.pipeline import Prepared

UNKNOWN = Origin(LOSS, "", "")
OPTIMIZER = Origin("optimizer", "", "")


@dataclass(frozen=True, eq=False)
class Simulated:
    """Holds a schedule and its timeline."""

    schedule: Schedule
    timeline: Timeline


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """Holds what explanations are made of.

    Attributes:
        problem: the step.
        unmodified: the save-all step.
        planned: the step of the plan.
        tensors: place of the op that makes each tensor of the problem.
        forward: place of each forward op.
        backward: place of each backward op.
        resident: bytes that are there through the whole step, by kind.
    """

    problem: Problem
    unmodified: Simulated
    planned: Simulated
    tensors: tuple[Origin, ...]
    forward: tuple[Origin, ...]
    backward: tuple[Origin, ...]
    resident: Mapping[str, int]

    def places(self, schedule: Schedule) -> Iterator[Origin]:
        """Yields where each instruction of a schedule comes from."""
        for position, instruction in enumerate(schedule.instructions):
            if instruction.kind in (Kind.ENCODE, Kind.DECODE):
                yield self.tensors[instruction.op]
            elif instruction.kind is Kind.RERUN or position < schedule.n_forward:
                yield self.forward[instruction.op]
            elif instruction.op < len(self.backward):
                yield self.backward[instruction.op]
            else:
                yield OPTIMIZER


def planned_step(prepared: Prepared, actions: Actions, resident: Mapping[str, int]) -> PlannedStep:
    """Simulates a plan and the save-all step, and finds where their ops come from.

    Args:
        prepared: the captured signature.
        actions: of the plan.
        resident: bytes by kind; they sum up to the problem's ``resident_bytes``.
    """
    problem = prepared.problem
    unmodified, planned = (_simulated(problem, lower(problem, carried_out)) for carried_out in ({}, actions))
    return PlannedStep(problem, unmodified, planned, *_places(prepared.layout, len(problem.tensors)), resident)


def _simulated(problem: Problem, schedule: Schedule) -> Simulated:
    return Simulated(schedule, simulate(problem, schedule))


def _places(layout: Layout, count: int) -> tuple[tuple[Origin, ...], tuple[Origin, ...], tuple[Origin, ...]]:
    """Returns the places of tensors, of forward ops and of backward ops."""
    graph = (layout.forward + layout.backward)[0].node.graph
    found = origins(graph.nodes)
    tensors = [UNKNOWN] * count
    for op in layout.forward + layout.backward:
        for t in op.outputs:
            tensors[t] = found.get(op.node, UNKNOWN)
    forward = tuple(found.get(op.node, UNKNOWN) for op in layout.forward)
    return tuple(tensors), forward, tuple(found.get(op.node, UNKNOWN) for op in layout.backward)
