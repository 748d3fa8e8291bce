"""Work: what each operator of a step computes and moves, whatever device it runs on.

With a device's rates it gives seconds for remote plans.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxhybrid.passes.storages import Layout, OpCall
from fxhybrid.profiling.cost_estimate import count_bytes, count_flops
from fxhybrid.profiling.op_profiler import call_of


@dataclass(frozen=True)
class OpWork:
    """Describes one operator call.

    Attributes:
        key: the call as text, as ``Profile`` names it.
        flops: floating-point operations of matrix products and convolutions; others are bound by ``moved_bytes``.
        moved_bytes: bytes of all inputs and outputs.
    """

    key: str
    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class StepWork:
    """Holds the work of each op of a problem, in the problem's order."""

    forward: tuple[OpWork, ...]
    backward: tuple[OpWork, ...]


def work_of(layout: Layout) -> StepWork:
    """Computes the work of every op, from shapes alone.

    A mask that its reader can do without costs only its own bytes, written: making it is part of the reader, as in
    the problem.
    """
    fused = {op.fused_with for op in layout.backward if op.fused_with is not None}
    forward = [_mask_work(op) if i in fused else _work(op) for i, op in enumerate(layout.forward)]
    return StepWork(tuple(forward), tuple(_work(op) for op in layout.backward))


def _work(op: OpCall) -> OpWork:
    node = op.node
    call, value = call_of(node.target, node.args, node.kwargs), node.meta["val"]
    return OpWork(call.key, count_flops(node.target, call.args, value), count_bytes((call.args, call.kwargs, value)))


def _mask_work(op: OpCall) -> OpWork:
    return OpWork(f"mask {op.node.target}", 0, count_bytes(op.node.meta["val"]))
