"""Recognizes a graph that Dynamo hands over again: a frame is traced anew where a guard names an object now gone."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx


def identity_of(graph: fx.GraphModule) -> Hashable | None:
    """Returns what is the same for graphs that compute the same of inputs of the same kinds.

    Returns:
        None for graphs that hold modules or constants, or whose inputs have changing sizes.
    """
    kinds = []
    targets = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            kind = _kind_of(node)
            if kind is None:
                return None
            kinds.append(kind)
        elif node.op in ("get_attr", "call_module"):
            return None
        else:
            targets.append(node.target)
    return graph.code, tuple(targets), tuple(kinds), _settings()


def _kind_of(node: fx.Node) -> Hashable | None:
    """Describes an input: layout, type, and where in Python it comes from; None where it has no fixed sizes."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if not all(type(n) is int for n in (*value.shape, *value.stride())):
        return None
    source: Any = getattr(node, "_dynamo_source", None)
    static = "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    layout = tuple(value.shape), value.stride(), value.dtype, value.device
    return *layout, value.requires_grad, value.is_leaf, type(source), static


def _settings() -> Hashable:
    """Returns what Dynamo guards besides: gradient mode and autocast."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        for kind in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.get_default_dtype(), *autocast
