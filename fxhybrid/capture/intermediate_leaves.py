"""Lets a model call ``requires_grad_()`` on a tensor that it computes, as adapters do for the sake of checkpoints.

Speech models assign ``x.requires_grad = True`` for the same reason; that is traced as the call.

In eager such a tensor becomes a leaf: nothing before it needs a gradient, and what comes after it has one. Parameters
get the same gradients without that, so the call is left out of the graph, and all that it would change is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxhybrid.errors import CaptureError
from fxhybrid.torch_internals import (
    OutputGraph,
    SetAttrBuiltinVariable,
    set_inplace_requires_grad_allowed,
    tree_leaves,
)

_CHECK = "_check_requires_grad_intermediate_outputs"  # Dynamo refuses whatever an output is computed from
_ASSIGN = "_call_setattr"
_SWITCH = set_inplace_requires_grad_allowed


@contextlib.contextmanager
def intermediate_leaves() -> Iterator[None]:
    """Lets Dynamo trace outputs that follow from such a tensor; ``drop_intermediate_leaves`` must come after it."""
    before, assign = getattr(OutputGraph, _CHECK), getattr(SetAttrBuiltinVariable, _ASSIGN)

    def as_call(builtin: Any, tx: Any, obj: Any, name: Any, value: Any) -> Any:
        if obj.is_tensor() and name.is_python_constant() and name.as_python_constant() == "requires_grad":
            obj.call_method(tx, "requires_grad_", [value], {})
            return value
        return assign(builtin, tx, obj, name, value)

    setattr(OutputGraph, _CHECK, lambda *_: None)
    setattr(SetAttrBuiltinVariable, _ASSIGN, as_call)
    try:
        yield
    finally:
        setattr(OutputGraph, _CHECK, before)
        setattr(SetAttrBuiltinVariable, _ASSIGN, assign)


def drop_intermediate_leaves(module: fx.GraphModule) -> None:
    """Takes ``requires_grad_()`` on intermediates out of Dynamo's graph.

    Raises:
        CaptureError: an output would need a gradient for that reason alone.
    """
    calls = [n for n in module.graph.nodes if n.op == "call_method" and n.target == "requires_grad_"]
    if not calls:
        return
    outputs = next(iter(module.graph.find_nodes(op="output"))).all_input_nodes
    leaves = {node.args[0] for node in calls}
    if any(_needs_gradient(node) and not _reaches_input(node, leaves) for node in outputs):
        raise CaptureError(
            "the model returns a tensor that needs a gradient only because requires_grad_() was called on it, or on "
            "what it is computed from, within the model; return it detached: x.detach()"
        )
    if module.graph.find_nodes(op="call_function", target=torch.autograd.grad):
        return  # the model itself differentiates by it
    for node in (*calls, *module.graph.find_nodes(op="call_function", target=_SWITCH)):
        module.graph.erase_node(node)
    module.recompile()


def _needs_gradient(node: fx.Node) -> bool:
    values = tree_leaves(node.meta.get("example_value"))
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _reaches_input(node: fx.Node, leaves: set[fx.Node]) -> bool:
    """Whether a gradient of ``node`` arrives at an input of the graph that needs one."""
    pending, seen = [node], {*leaves}
    while pending:
        node = pending.pop()
        if node in seen or not _needs_gradient(node):
            continue
        if node.op == "placeholder":
            return True
        seen.add(node)
        pending += node.all_input_nodes
    return False
