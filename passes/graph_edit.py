"""Small helpers for passes that change a joint graph in place."""

from __future__ import annotations

import linecache
import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph_module import _loader

from fxhybrid.capture.joint_graph import TAG, JointGraph, NodeTag, Phase, phase_of
from fxhybrid.torch_internals import FakeTensor, LazyGraphModule


class PlainGraph(fx.Graph):
    """Makes nodes without a search for symbolic sizes in their arguments, which takes half of the time."""

    def create_node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """Creates a node at the insertion point, as ``torch.fx.Graph`` does."""
        node = super().create_node(op, target, None, None, name, type_expr)
        for field, value in (("args", args), ("kwargs", kwargs)):
            if value:
                object.__setattr__(node, field, value)  # a node's own looks after a table that this leaves as it is
        return node


def call(
    joint: JointGraph, target: Any, args: tuple[Any, ...], phase: Phase, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """Makes a new call at the graph's insertion point, its fake value worked out from its arguments'."""
    node = joint.module.graph.call_function(target, args, dict(kwargs or {}))
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    found: list[torch.Tensor] = []
    fx.node.map_arg(args, lambda n: found.append(n.meta["val"]))
    mode = _fake_mode([*found, *(n.meta["val"] for n in joint.placeholders)])
    with mode, torch.no_grad():
        value = target(*values, **(kwargs or {}))
    node.meta = {"val": value, TAG: NodeTag(phase)}
    return node


def _fake_mode(values: Iterable[Any]) -> Any:
    """Returns the mode of the first fake tensor; sizes among the inputs are numbers."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Makes a module of a graph; torch forgets its generated source with it, which it would keep for good."""
    module = fx.GraphModule(root, graph)
    source: str = type(module).forward.__code__.co_filename
    weakref.finalize(module, _forget_source, source).atexit = False
    return module


def joint_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Makes a module of a joint graph, whose source is generated when it is first wanted: most are never run."""
    return LazyGraphModule(root, graph)


def _forget_source(name: str) -> None:
    _loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


def copy_of(joint: JointGraph) -> JointGraph:
    """Copies a joint graph, with the names of its nodes."""
    graph = PlainGraph()
    graph.output(graph.graph_copy(joint.module.graph, {})).meta = dict(joint.module.graph.output_node().meta)
    return JointGraph(joint_module(joint.module, graph), joint.inputs, joint.outputs)


def backward_nodes(joint: JointGraph) -> list[Any]:
    """Lists the nodes of the backward pass; gradients that the model itself takes belong to its forward pass."""
    return [node for node in joint.module.graph.nodes if phase_of(node) is Phase.BACKWARD]


def output_parts(node: fx.Node) -> dict[int, fx.Node]:
    """Finds the getitem of each output of ``node`` that is read."""
    return {int(user.args[1]): user for user in node.users if user.target is operator.getitem}  # type: ignore[arg-type]


def new_parts(joint: JointGraph, node: fx.Node, n_parts: int) -> list[fx.Node]:
    """Makes the getitem of each of the first outputs of ``node`` at the graph's insertion point."""
    parts = []
    for i in range(n_parts):
        part = joint.module.graph.call_function(operator.getitem, (node, i))
        part.meta = {"val": node.meta["val"][i], TAG: NodeTag(phase_of(node))}
        parts.append(part)
    return parts


def tangent_free(joint: JointGraph) -> set[fx.Node]:
    """Finds the nodes that no tangent reaches."""
    tangents = set(joint.tangents)
    free: set[fx.Node] = set()
    for node in joint.module.graph.nodes:
        if node not in tangents and all(n in free for n in node.all_input_nodes):
            free.add(node)
    return free


def memory_format_of(value: torch.Tensor) -> torch.memory_format | None:
    """Returns the format that ``clone`` needs to give this tensor's strides; None if there is none."""
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        fits = value.dim() == {torch.channels_last: 4, torch.channels_last_3d: 5}.get(layout, value.dim())
        if fits and value.is_contiguous(memory_format=layout):
            return layout
    return None
