"""Names torch's own Python functions for operators: a call of one takes two thirds of the time of ``torch.ops``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

# Given tensors wherever the operator takes tensors, each function calls just this operator with the arguments as given.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.clone.default: torch.clone,
    aten.convolution.default: torch.convolution,
    aten.detach.default: torch.detach,
    aten.div.Tensor: torch.div,
    aten.embedding.default: torch.embedding,
    aten.expand.default: Tensor.expand,
    aten.gelu.default: F.gelu,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.permute.default: torch.permute,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.select.int: torch.select,
    aten.squeeze.dim: torch.squeeze,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def python_binding(operator: Any, nodes: Iterable[fx.Node]) -> Callable[..., Any] | None:
    """Returns torch's function for an operator; None where there is none, or a node gives a number for a tensor.

    Args:
        operator: an overload.
        nodes: all that call it.
    """
    function = FUNCTIONS.get(operator)
    if function is None or any(_has_number(node) for node in nodes):
        return None
    return function


def _has_number(node: fx.Node) -> bool:
    """Whether a node passes a number where the operator takes a tensor: torch's functions choose another operator."""
    given = (node.args[i] for i in _tensor_positions(node.target) if i < len(node.args))
    return any(not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor) for value in given)


@cache
def _tensor_positions(operator: Any) -> tuple[int, ...]:
    """Returns the positions of the arguments that are tensors; the text of a type takes long."""
    return tuple(i for i, argument in enumerate(operator._schema.arguments) if str(argument.type) == "Tensor")
