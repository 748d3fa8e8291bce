"""What a plan expects of the backward pass that follows the call."""

from __future__ import annotations

from dataclasses import dataclass

from fxhybrid.capture.joint_graph import JointGraph, OutputKind
from fxhybrid.passes.storages import Layout


@dataclass(frozen=True)
class ExpectedBackward:
    """Describes a backward pass, as far as the plan depends on it.

    Attributes:
        absent: positions of the tangents that do not arrive.
        dropped: positions of the graph's outputs, bases of views included, that the caller no longer holds when it
            begins.
    """

    absent: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()


ALL_ARRIVE = ExpectedBackward()


def held_and_dropped(
    joint: JointGraph, layout: Layout, dropped: frozenset[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the storages of outputs that are held, and those that live to the end of the forward pass only."""
    outputs = [
        node
        for node, role in zip(joint.output_nodes, joint.outputs, strict=True)
        if role.kind is OutputKind.USER_OUTPUT
    ]
    held = {
        t
        for i, node in enumerate(outputs)
        if node is not None and i not in dropped
        for t in layout.storages_of.get(node, ())
    }
    kept = tuple(t for t in layout.outputs if t in held)
    gone = (t for t in layout.outputs if t not in held)
    return kept, tuple(dict.fromkeys([*layout.mutations, *gone]))
