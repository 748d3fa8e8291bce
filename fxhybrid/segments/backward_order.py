"""Reads from autograd's graph which parts of a step will run backward, in which order, and by which tangents."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fxhybrid.errors import CaptureError
from fxhybrid.runtime import StepFunction, step_of

CUSTOM = (
    "the custom autograd function {name} runs in Python between the graphs of the step: what it keeps and what its "
    "backward pass takes cannot be counted. Compile the submodules before and behind it, each with a budget of its "
    "own, or write it with operators that can be traced"
)


def halves_behind(results: Iterable[Tensor], steps: Sequence[StepFunction]) -> list[tuple[int, frozenset[int]]]:
    """Lists the backward halves that gradients of ``results`` lead to.

    Autograd runs the nodes that are ready by falling sequence number, and a node's consumers have higher numbers than
    the node itself. So falling numbers are the order.

    Args:
        results: get gradients.
        steps: of the parts, in the order in which they were called.

    Returns:
        For each half the position of its part and those of the tangents that arrive, in order. A tangent counts as
        arriving unless it is known from the parts' own graphs that it does not.

    Raises:
        CaptureError: a custom autograd function runs between the parts.
    """
    positions = {id(step): k for k, step in enumerate(steps)}
    arriving: dict[Any, set[int]] = {}
    waiting: list[tuple[int, int, Any]] = []
    halves = []

    def reach(node: Any, output: int) -> None:
        if node not in arriving:
            arriving[node] = set()
            heapq.heappush(waiting, (-node._sequence_nr(), len(arriving), node))  # noqa: SLF001 (no public name)
        arriving[node].add(output)

    for result in results:
        if result.grad_fn is not None:
            reach(result.grad_fn, result.output_nr)
    while waiting:
        node = heapq.heappop(waiting)[2]
        step = step_of(node)
        if step is None and isinstance(node, BackwardCFunction):
            raise CaptureError(CUSTOM.format(name=type(node).__name__.removesuffix("Backward")))
        following = node.next_functions
        if step is not None:
            present = frozenset(k for k, output in enumerate(step.tangent_outputs) if output in arriving[node])
            halves.append((positions[id(step)], present))
            inputs = zip(step.tensor_inputs, following, strict=True)
            following = [behind for i, behind in inputs if step.gradient_tangents[i] & present]
        for behind, output in following:
            if behind is not None:
                reach(behind, output)
    return [half for half in halves if half[1]]
