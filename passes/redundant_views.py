"""Drops views that change nothing from a half of a step: of small layers, a third of all calls are such."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def drop_redundant_views(graph: fx.Graph) -> None:
    """Lets readers of ``x.detach()`` and ``x.t().t()`` read ``x``, in place.

    What the graph returns stays an object of its own.
    """
    for node in graph.nodes:
        source = _source(node)
        if source is not None and _is_free(node, source):
            node.replace_all_uses_with(source)
    for node in reversed(graph.nodes):
        if node.target in (aten.detach.default, aten.t.default) and not node.users:
            graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node | None:
    """Returns what a node is another view of, with the same sizes and strides."""
    if node.target is aten.detach.default:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if node.target is not aten.t.default:
        return None
    once = node.args[0]
    if not isinstance(once, fx.Node) or once.target is not aten.t.default:
        return None
    return once.args[0] if isinstance(once.args[0], fx.Node) else None


def _is_free(node: fx.Node, source: fx.Node) -> bool:
    """Whether readers may take the source: a result of the graph only where nothing else reads that."""
    if all(user.op != "output" for user in node.users):
        return True
    between = node.args[0]
    return (
        node.target is aten.t.default
        and source.op == "call_function"
        and isinstance(between, fx.Node)
        and len(source.users) == len(between.users) == 1
    )
