"""Keeps a model's checks of values (``torch._check`` and the like) as operators that give nothing back.

Dynamo traces such a check as a Python number that is read by assertions alone. A plan has no such numbers, so the
tensor behind it is asserted instead; what Dynamo notes about the same number besides is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

ASSERTION = torch.ops.aten._assert_scalar.default
MESSAGE = "a check in the model's forward pass fails"


def assert_tensors(module: fx.GraphModule) -> None:
    """Replaces numbers that only assertions read by one assertion of their tensor, in Dynamo's graph."""
    for node in module.graph.find_nodes(op="call_method", target="item"):
        readers = _only_asserting(node)
        if readers is None:
            continue
        tensor = node.args[0]
        value = tensor.meta.get("example_value") if isinstance(tensor, fx.Node) else None
        if isinstance(value, Tensor) and value.dtype is torch.bool:
            with module.graph.inserting_after(node):
                check = module.graph.call_function(torch._assert_async, (tensor, f"{MESSAGE}{_line(node)}"))
            check.meta = {"stack_trace": node.meta.get("stack_trace")}
        for reader in reversed(readers):
            module.graph.erase_node(reader)
        module.graph.erase_node(node)
    module.recompile()


def _only_asserting(node: fx.Node) -> list[fx.Node] | None:
    """All that follows from a number, in order; None where anything but an assertion reads it in the end."""
    followed: dict[fx.Node, None] = {}
    pending = [*node.users]
    while pending:
        reader = pending.pop()
        value = reader.meta.get("example_value")
        if reader.target is not ASSERTION and not isinstance(value, (torch.SymBool, torch.SymInt, torch.SymFloat)):
            return None
        if reader not in followed:
            followed[reader] = None
            pending += reader.users
    return [n for n in node.graph.nodes if n in followed] if followed else None


def _line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""
