"""Where in the user's model an operator comes from: module path and source line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import fx

from fxhybrid.capture.joint_graph import TAG, NodeTag, Origin
from fxhybrid.capture.refusals import dotted_path, frames_of_text, is_library

LOSS = "loss"


def traced_origin(node: fx.Node) -> Origin | None:
    """Reads the place of a node of a traced graph from its meta; a backward node has that of its forward operator."""
    text = node.meta.get("stack_trace")
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not text and not stack:
        return None
    frames = [frame for frame in frames_of_text(text or "") if not is_library(frame[0])]
    line = f"{Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""
    innermost = list(stack.values())[-1] if stack else None
    if innermost is None:
        return Origin(LOSS, "", line)
    kind = getattr(innermost[1], "__name__", str(innermost[1]).rpartition(".")[2])
    return Origin(dotted_path(str(innermost[0])), kind, line)


def origins(nodes: Iterable[fx.Node]) -> dict[fx.Node, Origin]:
    """Finds the place of each node of a joint graph; what passes made comes from where its sources come from.

    Args:
        nodes: tagged, in graph order; placeholders and the output have no place.
    """
    found: dict[fx.Node, Origin] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        tag: NodeTag = node.meta[TAG]
        inherited = (found[source] for source in reversed(node.all_input_nodes) if source in found)
        place = tag.origin or next(inherited, None)
        if place is not None:
            found[node] = place
    return found
