"""What an operator call computes and moves, from shapes alone, and the cost that follows where it cannot be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

MATRIX = 256  # rows and columns of the product that tells how long an operation takes
RUNS = 3


def count_bytes(values: Any) -> int:
    """Sums the bytes of all tensors in nested arguments."""
    found: list[int] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value.numel() * value.element_size())
        return value

    fx.node.map_aggregate(values, note)
    return sum(found)


def count_flops(target: Any, args: tuple[Any, ...], result: Any) -> int:
    """Counts the floating-point operations of matrix products and convolutions; 0 for all others."""
    if target is torch.ops.aten.convolution_backward.default:
        gradient, weight = args[0], args[2]
        return 4 * gradient.numel() * (weight.numel() // weight.shape[0])  # type: ignore[no-any-return]  # torch's own count leaves groups out
    packet = getattr(target, "overloadpacket", None)
    count: Callable[..., Any] | None = flop_registry.get(packet) if packet is not None else None
    if count is None:
        return 0
    try:
        found: int = count(*args, out_val=result)
        return found
    except (TypeError, ValueError, AssertionError, IndexError):
        return 0  # a form of the operator that torch does not count; its bytes remain


def estimate_cost(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, int]:
    """Estimates seconds and allocated bytes of a call with fake tensors.

    It takes as long as copying all its inputs and outputs, and as a matrix product of as many operations; it allocates
    its outputs and, in case a kernel wants them in another layout, copies of its inputs.
    """
    result = target(*args, **kwargs)
    moved_bytes = count_bytes((args, dict(kwargs), result))
    flops = count_flops(target, args, result)
    source, copy = (torch.ones(max(moved_bytes, 1), dtype=torch.uint8) for _ in range(2))
    seconds = _fastest(lambda: copy.copy_(source))
    if flops:
        factor = torch.ones(MATRIX, MATRIX)
        seconds += flops * _fastest(lambda: factor @ factor) / (2 * MATRIX**3)
    return seconds, moved_bytes


def _fastest(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
