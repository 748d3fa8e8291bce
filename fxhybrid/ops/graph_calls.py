"""Calls in Dynamo's graph, before it is traced into operators."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx


def replace_calls(graph_module: fx.GraphModule, targets: Collection[Any], function: Callable[..., Any]) -> None:
    """Lets calls of ``targets`` call ``function`` with the same arguments, in place."""
    nodes = [node for node in graph_module.graph.nodes if node.target in targets]
    for node in nodes:
        node.target = function
    if nodes:
        graph_module.recompile()
