"""Gradient takes: a backward graph hands gradients over where they are made, instead of returning them at its end."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import fx
from torch.fx.graph import _BoxedCodeGen

import fxhybrid.ops.take_gradient  # noqa: F401  (registers the operator)
from fxhybrid.capture.joint_graph import storages
from fxhybrid.passes.graph_edit import graph_module


def taking_gradients(backward: fx.GraphModule, positions: AbstractSet[int]) -> fx.GraphModule:
    """Builds the backward half in which some gradients are taken as soon as they are made, and None is returned.

    Args:
        backward: takes arguments boxed; returns the gradients.
        positions: among the gradients; those that are None stay so.
    """
    graph = fx.Graph()
    graph.set_codegen(_BoxedCodeGen())
    results: list[fx.Node | None] = list(graph.graph_copy(backward.graph, {}))  # type: ignore[arg-type]
    for position in sorted(positions):
        gradient = results[position]
        if gradient is not None:
            _hand_over(graph, gradient, position)
            results[position] = None
    graph.output(results)
    return graph_module(backward, graph)


def _hand_over(graph: fx.Graph, gradient: fx.Node, position: int) -> None:
    """Emits the operator right behind the last call that the gradient needs; views move there."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    views, bases = _views_and_bases(gradient)
    last_argument = [node for node in graph.nodes if node.op == "placeholder"][-1]
    place = max([*bases, last_argument], key=order.__getitem__)
    for view in sorted(views, key=order.__getitem__):
        if order[view] > order[place]:
            place.append(view)
            place = view
    with graph.inserting_after(place):
        graph.call_function(torch.ops.fxhybrid.take_gradient.default, (gradient, position))


def _views_and_bases(node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """Finds the views that lead to a node, itself maybe included, and what they are views of."""
    views: set[fx.Node] = set()
    bases: set[fx.Node] = set()
    pending = [node]
    while pending:
        found = pending.pop()
        sources = {s for n in found.all_input_nodes for s in storages(n.meta["val"])}
        if found.op == "call_function" and set(storages(found.meta["val"])) <= sources:
            views.add(found)
            pending += found.all_input_nodes
        else:
            bases.add(found)
    return views, bases
