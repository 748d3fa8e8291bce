"""Tells what an instruction of a schedule is as a call: of its operator, or of another form of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxhybrid.ir.schedule import Instruction, Kind, without_mask
from fxhybrid.passes.faster_forms import faster_form
from fxhybrid.passes.storages import Layout, OpCall, fused_form, recompute_form

_FORMS = {Kind.RERUN: recompute_form, Kind.FUSED: fused_form, Kind.FASTER: faster_form}


@dataclass(frozen=True)
class EmittedCall:
    """Holds a call in terms of the joint graph's nodes; ``inputs`` are its storages, in the order of the reads."""

    op: OpCall
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]


def emitted_call(layout: Layout, instruction: Instruction, in_forward: bool) -> EmittedCall | None:
    """Returns the call of an instruction; None for a codec's, and for the optimizer's step, which is no node."""
    if instruction.kind in (Kind.ENCODE, Kind.DECODE):
        return None
    ops = layout.forward if in_forward or instruction.kind is Kind.RERUN else layout.backward
    if instruction.op >= len(ops):
        return None
    op = ops[instruction.op]
    make_form = _FORMS.get(instruction.kind)
    form = make_form(op.node) if make_form else None
    inputs = op.inputs
    if instruction.kind is Kind.FUSED and op.fused_with is not None:
        inputs = without_mask(op.inputs, layout.forward[op.fused_with])
    target, args = form or (op.node.target, op.node.args)
    return EmittedCall(op, target, args, {} if form else op.node.kwargs, inputs)
