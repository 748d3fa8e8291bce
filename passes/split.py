"""Splits: a rewritten joint graph becomes a forward and a backward graph, called boxed.

What crosses is exactly what the plan stores, plus resident inputs. Boxed calls hand over a list that the graph
empties, so that a saved tensor dies at its last use and not when the call returns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

import fxhybrid.ops.take_gradient  # noqa: F401  (registers the operator that is looked for)
from fxhybrid.capture.joint_graph import InputKind, JointGraph, OutputKind, Phase, phase_of
from fxhybrid.passes.direct_calls import DirectCalls
from fxhybrid.passes.graph_edit import PlainGraph, graph_module
from fxhybrid.passes.in_place import emit_in_place
from fxhybrid.passes.prune_tangents import prune_tangents
from fxhybrid.passes.redundant_views import drop_redundant_views


@dataclass(frozen=True, eq=False)
class SplitGraphs:
    """Holds the two halves of a step.

    Attributes:
        forward: takes all primals; returns mutations, user outputs, then the saved values.
        backward: takes saved values, resident inputs, then tangents; returns the gradients.
        n_forward_outputs: how many of forward's results are mutations and user outputs.
        n_saved: how many saved values follow them.
        resident_inputs: positions among the primals of those that backward reads.
        joint: what was split.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    n_forward_outputs: int
    n_saved: int
    resident_inputs: tuple[int, ...]
    joint: JointGraph

    @cached_property
    def hands_gradients_over(self) -> bool:
        """Whether the backward half lets gradients be taken as soon as they are made."""
        target = torch.ops.fxhybrid.take_gradient.default
        return bool(self.backward.graph.find_nodes(op="call_function", target=target))

    def run_forward(self, arguments: list[Any]) -> Sequence[Any]:
        """Runs the forward half; takes the arguments out of their list."""
        results: Sequence[Any] = self.forward.forward(arguments)
        return results

    def run_backward(self, arguments: list[Any]) -> Sequence[Any]:
        """Runs the backward half; takes the arguments out of their list."""
        results: Sequence[Any] = self.backward.forward(arguments)
        return results


def split(joint: JointGraph) -> SplitGraphs:
    """Splits ``joint`` in two; its nodes must be tagged with their phase."""
    tangents = joint.tangents
    primals = [n for n in joint.placeholders if n not in tangents]
    results = list(zip(joint.output_nodes, joint.outputs, strict=True))
    returned = [n for n, role in results if role.kind is not OutputKind.GRADIENT]
    gradients = [n for n, role in results if role.kind is OutputKind.GRADIENT]
    crossing = _crossing(joint, gradients)
    saved = [n for n in crossing if n.op == "call_function"]
    resident = [n for n in crossing if n.op == "placeholder" and n not in tangents]
    forward = _extract(joint, Phase.FORWARD, primals, [*returned, *saved])
    backward = _extract(joint, Phase.BACKWARD, [*saved, *resident, *tangents], gradients)
    positions = tuple(primals.index(n) for n in resident)
    return SplitGraphs(forward, backward, len(returned), len(saved), positions, joint)


def forward_only(joint: JointGraph) -> SplitGraphs:
    """Returns halves that store nothing: the forward pass runs, no backward pass follows."""
    pairs = list(zip(joint.placeholders, joint.inputs, strict=True))
    primals = [n for n, role in pairs if role.kind is not InputKind.TANGENT]
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    returned = [n for n, role in results if role.kind is not OutputKind.GRADIENT]
    forward = _extract(joint, Phase.FORWARD, primals, returned)
    return SplitGraphs(forward, forward, len(returned), 0, (), joint)


@dataclass(frozen=True, eq=False)
class PartialBackward:
    """A backward half for some of the output gradients.

    Attributes:
        module: takes those arguments of the whole backward half that it reads; returns the gradients, None where none
            arrives.
        reads: positions of these arguments.
    """

    module: fx.GraphModule
    reads: tuple[int, ...]


def backward_without(graphs: SplitGraphs, absent: frozenset[int]) -> PartialBackward:
    """Builds the backward half for a step whose forward half has run already, where some tangents do not arrive."""
    pruned = prune_tangents(graphs.joint, absent)
    gradients = [
        n for n, role in zip(pruned.output_nodes, pruned.outputs, strict=True) if role.kind is OutputKind.GRADIENT
    ]
    by_name = {node.name: node for node in pruned.module.graph.nodes}
    arguments = [by_name[n.name] for n in graphs.backward.graph.nodes if n.op == "placeholder"]
    read = set(gradients)
    for node in pruned.module.graph.nodes:
        if node.op == "call_function" and phase_of(node) is Phase.BACKWARD:
            read.update(node.all_input_nodes)
    reads = tuple(i for i, node in enumerate(arguments) if node in read)
    return PartialBackward(_extract(pruned, Phase.BACKWARD, [arguments[i] for i in reads], gradients), reads)


def _crossing(joint: JointGraph, gradients: list[fx.Node | None]) -> list[fx.Node]:
    """Finds the nodes made before the backward pass and read in it, in order of birth."""
    read = dict.fromkeys(n for n in gradients if n is not None)
    for node in joint.module.graph.nodes:
        if node.op == "call_function" and phase_of(node) is Phase.BACKWARD:
            read.update(dict.fromkeys(node.all_input_nodes))
    return [n for n in joint.module.graph.nodes if n in read and n.op != "get_attr" and phase_of(n) is Phase.FORWARD]


def _extract(joint: JointGraph, phase: Phase, inputs: list[fx.Node], results: list[fx.Node | None]) -> fx.GraphModule:
    graph = PlainGraph()
    graph.set_codegen(DirectCalls())
    new: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta = copy.copy(node.meta)
    arriving = {new[node] for node in inputs if node.op == "placeholder"}
    for node in joint.module.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and phase_of(node) is phase):
            new[node] = graph.node_copy(node, lambda n: new[n])
            emit_in_place(new[node], arriving)
    graph.output([None if n is None else new[n] for n in results])
    if phase is Phase.BACKWARD:
        drop_redundant_views(graph)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph_module(joint.module, graph)
