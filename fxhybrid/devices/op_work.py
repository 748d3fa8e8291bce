"""Work: what each operator of a step computes and moves, whatever device it runs on.

With a device's rates it gives seconds for a device that is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from fxhybrid.passes.storages import Layout, OpCall
from fxhybrid.profiling.op_profiler import call_of


@dataclass(frozen=True)
class OpWork:
    """One operator call.

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
    """The work of each op of a problem, in the problem's order."""

    forward: tuple[OpWork, ...]
    backward: tuple[OpWork, ...]


def work_of(layout: Layout) -> StepWork:
    """The work of every op, from shapes alone.

    A mask that its reader can do without costs only its own bytes, written: making it is part of the reader, as in
    the problem.
    """
    fused = {op.fused_with for op in layout.backward if op.fused_with is not None}
    forward = [_mask_work(op) if i in fused else _work(op) for i, op in enumerate(layout.forward)]
    return StepWork(tuple(forward), tuple(_work(op) for op in layout.backward))


def _work(op: OpCall) -> OpWork:
    node = op.node
    call = call_of(node.target, node.args, node.kwargs)
    return OpWork(call.key, _flops(node, call.args), _n_bytes((call.args, call.kwargs, node.meta["val"])))


def _mask_work(op: OpCall) -> OpWork:
    return OpWork(f"mask {op.node.target}", 0, _n_bytes(op.node.meta["val"]))


def _n_bytes(values: Any) -> int:
    """Bytes of all tensors in nested arguments."""
    found: list[int] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value.numel() * value.element_size())
        return value

    fx.node.map_aggregate(values, note)
    return sum(found)


def _flops(node: fx.Node, args: tuple[Any, ...]) -> int:
    if node.target is torch.ops.aten.convolution_backward.default:
        gradient, weight = args[0], args[2]
        return int(4 * gradient.numel() * weight[0].numel())  # torch's own count leaves groups out
    packet = getattr(node.target, "overloadpacket", None)
    count: Callable[..., Any] | None = flop_registry.get(packet) if packet is not None else None
    if count is None:
        return 0
    try:
        return int(count(*args, out_val=node.meta["val"]))
    except (TypeError, ValueError, AssertionError, IndexError):
        return 0  # a form of the operator that torch does not count; its bytes remain
