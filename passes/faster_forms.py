"""Runs operators that come in a form with little workspace in their usual, faster form where a plan has room for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Instruction, Kind, Schedule
from fxhybrid.ir.simulator import simulate
from fxhybrid.passes.storages import Layout
from fxhybrid.profiling.cost_cache import OpCost
from fxhybrid.profiling.op_profiler import Call, call_of

aten = torch.ops.aten


def faster_form(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Returns the usual form of an operator, ``(target, arguments)``; None where it is in that already."""
    if node.target is not torch.ops.fxhybrid.batch_norm_backward.default:
        return None
    gradient, x, weight, mean, invstd, eps, mask = node.args
    arguments = (gradient, x, weight, None, None, mean, invstd, True, eps, mask)
    return aten.native_batch_norm_backward.default, arguments


def faster_calls(layout: Layout) -> Iterator[Call]:
    """Yields the calls in their usual form, whose costs are needed to choose."""
    for op in layout.backward:
        form = faster_form(op.node)
        if form is not None:
            yield call_of(*form)


def with_faster_forms(
    problem: Problem, layout: Layout, costs: Mapping[str, OpCost], schedule: Schedule, headroom_bytes: int
) -> Schedule:
    """Chooses the usual form of operators where memory rises no higher by it than it may in the backward half.

    Without headroom the peak of the step, and that of its backward half, stay what they are.

    Args:
        problem: of the plan.
        layout: its operators.
        costs: by call key; operators whose usual form is not among them stay as they are.
        schedule: of the plan.
        headroom_bytes: how far the backward half may rise beyond its peak; below zero, how far it stays under it.
    """
    places = [
        position
        for position, instruction in enumerate(schedule.instructions)
        if position >= schedule.n_forward and _form(layout, instruction) is not None
    ]
    if not places:
        return schedule
    during = simulate(problem, schedule).during_bytes
    peak = int(during[schedule.n_forward :].max())
    limit = peak + headroom_bytes
    instructions = list(schedule.instructions)
    for position in places:
        instruction = instructions[position]
        form = _form(layout, instruction)
        cost = costs.get(call_of(*form).key) if form else None
        if cost is None or cost.seconds >= instruction.seconds or (headroom_bytes <= 0 and during[position] == peak):
            continue  # what holds the peak of the step stays, or it would rise less than was predicted
        made = sum(schedule.values[value].size_bytes for value in instruction.writes)
        before = int(during[position]) - max(instruction.alloc_peak_bytes, made)
        if before + max(cost.alloc_peak_bytes, made) <= limit:
            rise, seconds = cost.alloc_peak_bytes, cost.seconds
            instructions[position] = instruction._replace(kind=Kind.FASTER, alloc_peak_bytes=rise, seconds=seconds)
    return replace(schedule, instructions=tuple(instructions))


def _form(layout: Layout, instruction: Instruction) -> tuple[Any, tuple[Any, ...]] | None:
    if instruction.kind is not Kind.RUN or instruction.op >= len(layout.backward):
        return None
    return faster_form(layout.backward[instruction.op].node)
