"""Runs elementwise operators in the storage of an input that dies there, as eager models do by ``relu_`` and ``add_``.

A new tensor costs fresh pages and more memory traffic. The joint graph stays functional: a note on a node tells the
split to emit the form in place, so that a pass over the joint graph need not know of overwritten values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import fxhybrid.ops.batch_norm  # noqa: F401  (registers the operator that is looked for)
from fxhybrid.capture.joint_graph import storages
from fxhybrid.ir.part import Headroom
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import Instruction, Schedule, Value
from fxhybrid.ir.simulator import Timeline, simulate
from fxhybrid.ops.hand_on import HAND_ON
from fxhybrid.ops.masks import APPLY_MASK, APPLY_MASK_IN_PLACE
from fxhybrid.ops.own_storage import Probe, own_or_new
from fxhybrid.passes.emitted_call import EmittedCall, emitted_call
from fxhybrid.passes.storages import Layout
from fxhybrid.torch_internals import OpOverload

aten = torch.ops.aten

OVERWRITES = "overwrites"  # in a node's meta: the position of the argument whose storage takes the result

IN_PLACE: Mapping[Any, Any] = {  # by the operator: what writes its result into its first argument
    aten.add.Tensor: aten.add_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.gelu.default: aten.gelu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.relu.default: aten.relu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.silu.default: aten.silu_.default,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.tanh.default: aten.tanh_.default,
    APPLY_MASK: APPLY_MASK_IN_PLACE,
}
GRADIENT_INPUT: Mapping[Any, Any] = {  # the same, where the result's storage is an argument by name
    aten.gelu_backward.default: aten.gelu_backward.grad_input,
    aten.hardtanh_backward.default: aten.hardtanh_backward.grad_input,
    aten.sigmoid_backward.default: aten.sigmoid_backward.grad_input,
    aten.silu_backward.default: aten.silu_backward.grad_input,
    aten.tanh_backward.default: aten.tanh_backward.grad_input,
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
}
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
EXACT_STORAGES = (  # beside elementwise operators: a storage of its own for each result, and no larger than that
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.clone.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    torch.ops.fxhybrid.batch_norm_backward.default,
)


def in_place(
    problem: Problem, layout: Layout, schedule: Schedule, headroom: Headroom, dying: Mapping[fx.Node, int]
) -> Schedule:
    """Lets operators overwrite inputs that die with them, except where a half without headroom has its peak.

    There they stay as they are, so that the step rises as high as was predicted.

    Args:
        problem: of the plan.
        layout: its operators.
        schedule: of the plan.
        headroom: how far the halves may rise beyond their peaks; where that is nothing, they may hold the step's.
        dying: tangents that nobody is known to keep, which is looked at again when the operator runs; by each, the last
            backward operator that reads it.
    """
    timeline = simulate(problem, schedule)
    peaks = _peaks(problem, schedule, timeline, headroom)
    calls = [emitted_call(layout, i, k < schedule.n_forward) for k, i in enumerate(schedule.instructions)]
    held = _held_values(layout, schedule, calls)
    instructions, overwrites = list(schedule.instructions), []
    for position, call in enumerate(calls):
        instruction = instructions[position]
        if call is None or position in peaks or len(instruction.writes) != 1:
            continue
        for argument in _candidates(call):
            if position >= schedule.n_forward and _is_last_read(call, argument, instruction, dying):
                instructions[position] = _overwriting(instruction, schedule.values[instruction.writes[0]])
                overwrites.append((position, argument))
                break
            value = _value_of(layout, call, instruction, call.args[argument])
            if value is not None and value not in held and timeline.death[value] == position:
                instructions[position] = _overwriting(instruction, schedule.values[value])
                overwrites.append((position, argument))
                break
    return replace(schedule, instructions=tuple(instructions), overwrites=tuple(overwrites))


def _overwriting(instruction: Instruction, overwritten: Value) -> Instruction:
    rise = max(instruction.alloc_peak_bytes - overwritten.size_bytes, 0)
    return instruction._replace(alloc_peak_bytes=rise)


def _is_last_read(call: EmittedCall, argument: int, instruction: Instruction, dying: Mapping[fx.Node, int]) -> bool:
    """Says whether a backward operator is the last one to read a tangent, as a whole and in no other way."""
    tangent: Any = call.args[argument]
    if call.target not in GRADIENT_INPUT or dying.get(tangent) != instruction.op:
        return False
    (storage,) = storages(tangent.meta["val"])
    return sum(storage in storages(node.meta.get("val")) for node in _nodes(call)) == 1


def emit_in_place(node: fx.Node, arriving: Collection[fx.Node] = ()) -> None:
    """Gives a node of a half its form in place, if a note asks for it.

    Args:
        node: of the half.
        arriving: inputs that somebody else may hold.
    """
    position = node.meta.get(OVERWRITES)
    if position is None:
        return
    if position:
        node.args = (node.args[position], *node.args[:position], *node.args[position + 1 :])
    if node.target in GRADIENT_INPUT:
        target: Any = node.args[0]
        if target in arriving:
            with node.graph.inserting_before(node):
                meta = dict(target.meta)
                target = node.graph.call_function(own_or_new, (target, node.graph.call_function(Probe)))
                target.meta = meta
        node.kwargs = {**node.kwargs, "grad_input": target}
    node.target = IN_PLACE.get(node.target) or GRADIENT_INPUT[node.target]


def _peaks(problem: Problem, schedule: Schedule, timeline: Timeline, headroom: Headroom) -> set[int]:
    """Finds where memory is highest in each half that may hold the step's peak.

    That is so whether gradients live to the half's end or are taken as they are made.
    """
    taken = simulate(replace(problem, gradients=()), schedule)
    halves = [] if headroom.forward_bytes > 0 else [(0, schedule.n_forward)]
    halves += [] if headroom.backward_bytes > 0 else [(schedule.n_forward, len(schedule.instructions))]
    found: set[int] = set()
    for during in (timeline.during_bytes, taken.during_bytes):
        for start, end in halves:
            limit = during[start:end].max(initial=0)
            found.update(i for i in range(start, end) if during[i] == limit)
    return found


def _held_values(layout: Layout, schedule: Schedule, calls: Sequence[EmittedCall | None]) -> set[int]:
    """Finds values that someone else may look at after their last reader, or whose storage may be another's, too."""
    returned = {*layout.outputs, *layout.mutations, *layout.gradients}
    held = {*schedule.stored, *(i for i, value in enumerate(schedule.values) if value.tensor in returned)}
    for instruction, call in zip(schedule.instructions, calls, strict=True):
        if call is None or not owns_results(call.target):
            held.update(instruction.writes)
        if call is None or not instruction.writes or may_keep(call.target):
            held.update(instruction.reads)
    return held


def may_keep(target: Any) -> bool:
    """Says whether an operator, a user's for one, may hold on to what it reads; one without a result may, too."""
    return not isinstance(target, OpOverload) or target.namespace not in ("aten", "fxhybrid") or target is HAND_ON


def owns_results(target: Any) -> bool:
    """Says whether each result of an operator is in a new storage of its own, and no larger than the result.

    Some kernels leave a larger storage behind (``col2im``), which would live as long as what overwrites it.
    """
    if target in EXACT_STORAGES or target in IN_PLACE or target in GRADIENT_INPUT:
        return True
    is_elementwise = isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
    return is_elementwise and len(target._schema.returns) == 1 and target._schema.returns[0].alias_info is None


def _candidates(call: EmittedCall) -> Iterator[int]:
    """Yields the positions of the arguments that the operator could overwrite with its result, of the same form."""
    if call.target not in IN_PLACE and call.target not in GRADIENT_INPUT:
        return
    result: Tensor = call.op.node.meta["val"]
    commutes = call.target in COMMUTATIVE and not call.kwargs
    for position, argument in enumerate(call.args[: 2 if commutes else 1]):
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
        if not isinstance(value, Tensor) or call.args.count(argument) > 1:
            continue
        if (value.shape, value.stride(), value.dtype) == (result.shape, result.stride(), result.dtype):
            yield position


def _value_of(layout: Layout, call: EmittedCall, instruction: Instruction, argument: fx.Node) -> int | None:
    """Returns the value that an argument is the whole of, if no other argument is a part of it."""
    behind = layout.storages_of.get(argument, ())
    if len(behind) != 1 or layout.storages[behind[0]].base is not argument:
        return None
    others = (n for n in _nodes(call) if n is not argument)
    if any(behind[0] in layout.storages_of.get(n, ()) for n in others):
        return None
    return instruction.reads[call.inputs.index(behind[0])]


def _nodes(call: EmittedCall) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((call.args, call.kwargs), found.append)
    return found
