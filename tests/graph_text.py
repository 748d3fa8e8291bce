"""Graphs as short text, for tests that compare before and after."""

from __future__ import annotations

from torch import fx

from fxhybrid.capture.joint_graph import TAG, JointGraph


def graph_text(graph: JointGraph | fx.GraphModule) -> str:
    """One line a node: ``F name = operator(arguments)``, F or B for the half of the step it belongs to."""
    module = graph.module if isinstance(graph, JointGraph) else graph
    lines = []
    for node in module.graph.nodes:
        phase = node.meta[TAG].phase.value[0].upper() if TAG in node.meta else " "
        arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        if node.op == "placeholder":
            lines.append(f"{phase} {node.name}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        else:
            target = str(node.target).removeprefix("aten.").removesuffix(".default")
            target = "getitem" if "getitem" in target else target
            lines.append(f"{phase} {node.name} = {target}({arguments})")
    return "\n".join(lines)
