"""The gradient of a value that is written where a mask says so: the sum over the chosen elements alone.

Eager picks them, as many as there are; a trace sums over all with zeros between, which rounds in another way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@torch.library.custom_op("fxhybrid::masked_sum", mutates_args=())
def masked_sum(gradient: Tensor, mask: Tensor) -> Tensor:
    """Sums the elements of ``gradient`` where ``mask``; both broadcast."""
    return gradient.masked_select(mask).sum()


@masked_sum.register_fake
def _(gradient: Tensor, mask: Tensor) -> Tensor:
    return gradient.new_empty(())


def sum_chosen_elements(graph_module: fx.GraphModule) -> None:
    """Puts ``masked_sum`` in the place of sums over zeros in AOTAutograd's graph, in place."""
    graph = graph_module.graph
    fills = {n.meta.get("seq_nr") for n in graph.find_nodes(op="call_function", target=aten.masked_fill.Tensor)}
    for node in graph.find_nodes(op="call_function", target=aten.sum.default):
        source: Any = node.args[0]
        # a gradient has the number of the operator that it is of
        is_gradient = node.meta.get("partitioner_tag") == "is_backward" and node.meta.get("seq_nr") in fills
        if is_gradient and source.target is aten.where.self:
            mask, gradient, _ = source.args
            node.target, node.args = torch.ops.fxhybrid.masked_sum.default, (gradient, mask)
    graph.eliminate_dead_code(is_impure_node=_is_no_where)


def _is_no_where(node: fx.Node) -> bool:
    return node.target not in (aten.where.self, aten.scalar_tensor.default)
