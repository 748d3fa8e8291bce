"""Lets a plan decide on what a graph takes from the graph before it: raw, in an encoded form, or not at all.

Inputs are resident: there from beginning to end, never decided. What an earlier graph of the same step made lives only
as long as somebody needs it. So such an input becomes the result of an operator that hands it on, which a plan
may store in any form like every other tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxhybrid.capture.joint_graph import TAG, InputKind, JointGraph, NodeTag, OutputKind, Phase, phase_of, storages
from fxhybrid.ops.hand_on import HAND_ON
from fxhybrid.passes.graph_edit import backward_nodes, call, joint_module


def with_boundaries(joint: JointGraph, positions: Collection[int]) -> JointGraph:
    """Returns the joint graph in which inputs at these positions are handed on; ``joint`` stays as it is."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    output = graph.output(graph.graph_copy(joint.module.graph, twins))
    for node, twin in twins.items():
        twin.meta = dict(node.meta)
    output.meta = dict(joint.module.graph.output_node().meta)
    result = JointGraph(joint_module(joint.module, graph), joint.inputs, joint.outputs)
    placeholders = result.placeholders
    for position in sorted(positions):
        _hand_on(result, placeholders[position], placeholders[-1])
    _weight_gradients_first(result)
    graph.lint()
    return result


def _weight_gradients_first(joint: JointGraph) -> None:
    """Moves what reads output gradients and leads to the gradient of one parameter, and nowhere else, to the front.

    Where a loss is traced with the layers before it, operators that wait for it are in that order already. Here the
    last layer's gradients would come last, and keep its input for the whole backward half.
    """
    tangents = set(joint.tangents)
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    gradients = {n for n, role in results if role.kind is OutputKind.GRADIENT and _is_parameter(joint, role.of)}

    def leads_to_one(node: fx.Node) -> bool:
        users = list(node.users)
        while len(users) == 1 and users[0].op != "output":
            node, users = users[0], list(users[0].users)
        return len(users) == 1 and node in gradients

    backward = backward_nodes(joint)
    first = next((n for n in backward if n.op == "call_function"), None)
    for node in backward:
        sources = {n for n in node.all_input_nodes if phase_of(n) is Phase.BACKWARD}
        if first not in (None, node) and sources and sources <= tangents and leads_to_one(node):
            first.prepend(node)


def _is_parameter(joint: JointGraph, position: int) -> bool:
    return joint.inputs[position].kind is InputKind.PARAMETER


def can_be_handed_on(joint: JointGraph, position: int) -> bool:
    """Says whether an input is a whole storage of numbers that the graph reads and does not change."""
    role, node = joint.inputs[position], joint.placeholders[position]
    value = node.meta["val"]
    if role.kind is not InputKind.USER_INPUT or role.mutated or not isinstance(value, torch.Tensor):
        return False
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    shared = sum(storages(n.meta.get("val")) == storages(value) for n in joint.placeholders) > 1
    return bool(node.users) and value.is_floating_point() and value.numel() > 0 and whole and not shared


def _hand_on(joint: JointGraph, placeholder: fx.Node, last: fx.Node) -> None:
    graph = joint.module.graph
    old = storages(placeholder.meta["val"])
    with graph.inserting_after(last):
        handed = call(joint, HAND_ON, (placeholder,), Phase.FORWARD)
    handed.meta[TAG] = NodeTag(Phase.FORWARD)
    placeholder.replace_all_uses_with(handed, lambda user: user is not handed)
    base = handed.meta["val"]

    def moved(value: Any) -> Any:
        """Puts what looks at the input on the storage of what is handed on."""
        if not isinstance(value, torch.Tensor) or storages(value) != old:
            return value
        flat = torch.as_strided(base, value.shape, value.stride(), value.storage_offset())
        return flat if value.dtype == base.dtype else flat.view(value.dtype)

    for node in graph.nodes:
        if node.op == "call_function" and node is not handed and any(s in old for s in storages(node.meta.get("val"))):
            with base.fake_mode, torch.no_grad():
                node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
