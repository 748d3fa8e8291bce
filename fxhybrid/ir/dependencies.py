"""The dependency graph of a training step: which op makes what, and who reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from fxhybrid.ir.program import Op

if TYPE_CHECKING:
    import networkx as nx

Node = tuple[str, int]  # a kind, and an index among those of that kind
FORWARD, BACKWARD, TENSOR = "forward", "backward", "tensor"


def dependency_graph(forward: Sequence[Op], backward: Sequence[Op]) -> nx.DiGraph[Node]:
    """Builds the graph in which an edge leads from a tensor to its readers, and from an op to what it makes."""
    import networkx as nx  # takes a third of a second to load, and only planning needs it

    graph: nx.DiGraph[Node] = nx.DiGraph()
    for kind, ops in ((FORWARD, forward), (BACKWARD, backward)):
        graph.add_nodes_from((kind, i) for i in range(len(ops)))
        for i, op in enumerate(ops):
            graph.add_edges_from(((TENSOR, t), (kind, i)) for t in op.inputs)
            graph.add_edges_from(((kind, i), (TENSOR, t)) for t in op.outputs)
    return graph


def ancestors(graph: nx.DiGraph[Node], nodes: Iterable[Node], *, blocked: Collection[Node] = ()) -> set[Node]:
    """Returns ``nodes`` and all that they depend on; blocked nodes are neither returned nor passed through.

    ``networkx.ancestors`` takes one node and passes through all.
    """
    found = {node for node in nodes if node not in blocked}
    stack = list(found)
    while stack:
        for node in graph.pred[stack.pop()]:
            if node not in found and node not in blocked:
                found.add(node)
                stack.append(node)
    return found


def find_cycle(graph: nx.DiGraph[Node]) -> list[Node]:
    """Returns the ops on a cycle in the order in which each depends on the one before; empty where there is none."""
    import networkx as nx

    try:
        edges = nx.find_cycle(graph)
    except nx.NetworkXNoCycle:
        return []
    return [source for source, _ in edges if source[0] != TENSOR]
