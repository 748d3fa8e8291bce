"""Gradient takes: a backward graph hands gradients over where they are made, instead of returning them at its end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx

import fxhybrid.ops.take_gradient  # noqa: F401  (registers the operator)
from fxhybrid.capture.joint_graph import TAG, JointGraph, NodeTag, OutputKind, Phase, phase_of, storages
from fxhybrid.passes.direct_calls import DirectCalls
from fxhybrid.passes.graph_edit import PlainGraph, call, copy_of, graph_module

TAKE = torch.ops.fxhybrid.take_gradient.default


def taking_gradients(backward: fx.GraphModule, positions: AbstractSet[int]) -> fx.GraphModule:
    """Builds the backward half in which some gradients are taken as soon as they are made, and None is returned.

    Args:
        backward: takes arguments boxed; returns the gradients.
        positions: among the gradients; those that are None stay so.
    """
    graph = PlainGraph()
    graph.set_codegen(DirectCalls())
    results: list[fx.Node | None] = list(graph.graph_copy(backward.graph, {}))  # type: ignore[arg-type]
    for position in sorted(positions):
        gradient = results[position]
        if gradient is not None:
            _hand_over(graph, gradient, position)
            results[position] = None
    graph.output(results)
    return graph_module(backward, graph)


def updating_parameters(joint: JointGraph, positions: AbstractSet[int]) -> JointGraph:
    """Builds the joint graph in which gradients are taken as soon as the parameters may be overwritten.

    That is when the gradient is complete, and nothing reads the parameter any more: neither the backward pass itself,
    nor anything that it may recompute. A gradient that others read later, too, is taken then; one that others have,
    or that lies in memory in another order than its parameter, is copied first, as autograd does.

    Args:
        joint: its plan is not made yet.
        positions: of the parameters among the graph's inputs; those without a gradient count for nothing.
    """
    copied = copy_of(joint)
    graph = copied.module.graph
    results = list(copied.output_nodes)
    last_reads = _last_reads(copied, positions)
    counts = _storage_counts(results)
    for number, role in enumerate(joint.outputs):
        gradient = results[number]
        if role.kind is not OutputKind.GRADIENT or gradient is None or role.of not in positions:
            continue
        value, parameter = gradient.meta["val"], copied.placeholders[role.of].meta["val"]
        (storage,) = storages(value)
        contiguous = parameter.is_contiguous() and not value.is_contiguous()
        if contiguous or counts[storage] > 1 or _is_given(gradient):
            gradient = _copy(copied, gradient, contiguous)
            storage = storages(gradient.meta["val"])[0]
        readers = [n for n in graph.nodes if n.op == "call_function" and storage in _read(n)]
        _hand_over(graph, gradient, role.of, [*last_reads.get(role.of, ()), *readers])
        results[number] = None
    graph.output_node().args = (tuple(results),)
    return copied


def take_nodes(joint: JointGraph) -> Mapping[int, fx.Node]:
    """Returns the gradients that a graph hands over, by position of the input."""
    found = (node.args for node in joint.module.graph.nodes if node.target is TAKE)
    return {position: gradient for gradient, position in found}


def _hand_over(graph: fx.Graph, gradient: fx.Node, position: int, after: Iterable[fx.Node] = ()) -> None:
    """Emits the operator right behind the last call that the gradient needs, and other nodes; views move there."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    views, bases = _views_and_bases(gradient)
    last_argument = [node for node in graph.nodes if node.op == "placeholder"][-1]
    place = max([*bases, last_argument, *after], key=order.__getitem__)
    for view in sorted(views, key=order.__getitem__):
        if order[view] > order[place]:
            place.append(view)
            place = view
    with graph.inserting_after(place):
        graph.call_function(TAKE, (gradient, position)).meta = {"val": None, TAG: NodeTag(Phase.BACKWARD)}


def _views_and_bases(node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """Finds the views that lead to a node, itself maybe included, and what they are views of."""
    views: set[fx.Node] = set()
    bases: set[fx.Node] = set()
    pending = [node]
    while pending:
        found = pending.pop()
        if found.op == "call_function" and set(storages(found.meta["val"])) <= _read(found):
            views.add(found)
            pending += found.all_input_nodes
        else:
            bases.add(found)
    return views, bases


def _read(node: fx.Node) -> set[int]:
    return {s for n in node.all_input_nodes for s in storages(n.meta["val"])}


def _is_given(gradient: fx.Node) -> bool:
    """Tells whether a gradient was not made by the backward pass: an output's gradient, or made by the forward pass."""
    _, bases = _views_and_bases(gradient)
    return any(base.op != "call_function" or phase_of(base) is Phase.FORWARD for base in bases)


def _storage_counts(results: Iterable[fx.Node | None]) -> Mapping[int, int]:
    counts: dict[int, int] = {}
    for node in results:
        for storage in set() if node is None else set(storages(node.meta["val"])):
            counts[storage] = counts.get(storage, 0) + 1
    return counts


def _copy(joint: JointGraph, gradient: fx.Node, contiguous: bool) -> fx.Node:
    graph = joint.module.graph
    views, bases = _views_and_bases(gradient)
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max([*views, *bases, joint.placeholders[-1]], key=order.__getitem__)
    kwargs: dict[str, Any] = {"memory_format": torch.contiguous_format} if contiguous else {}
    with graph.inserting_after(last):
        return call(joint, torch.ops.aten.clone.default, (gradient,), Phase.BACKWARD, kwargs)


def _last_reads(joint: JointGraph, positions: Collection[int]) -> Mapping[int, list[fx.Node]]:
    """Finds for each parameter the last node of the backward pass that reads it, or may have it read again.

    What is recomputed for a node of the backward pass may read every parameter that its sources stem from.
    """
    own = {s: 1 << i for i in positions for s in storages(joint.placeholders[i].meta["val"])}
    behind: dict[fx.Node, int] = {}  # the parameters that a node of the forward pass stems from, one bit for each
    last: dict[int, fx.Node] = {}
    for node in joint.module.graph.nodes:
        sources = 0
        for source in node.all_input_nodes:
            sources |= behind.get(source, 0)
        if node.op != "call_function" or phase_of(node) is Phase.FORWARD:
            behind[node] = sources
            for storage in storages(node.meta.get("val")):
                behind[node] |= own.get(storage, 0)
            continue
        for storage in _read(node):
            sources |= own.get(storage, 0)
        for i in positions:
            if sources >> i & 1:
                last[i] = node
    return {i: [node] for i, node in last.items()}
