"""What goes into a joint graph and comes out, whatever plan carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxhybrid.capture.joint_graph import InputKind, JointGraph, OutputKind
from fxhybrid.passes.prune_tangents import tangents_behind


@dataclass(frozen=True, eq=False)
class StepInterface:
    """Describes what goes into a joint graph and comes out, whatever plan carries it out.

    Attributes:
        gradient_tangents: for each primal, the tangents that its gradient depends on.
        gradient_values: for each primal, the fake value of its gradient; None where it has none.
        tangent_values: the fake value of each tangent.
        tensor_inputs: positions of the primals that are tensors.
    """

    gradient_tangents: tuple[frozenset[int], ...]
    gradient_values: tuple[Tensor | None, ...]
    tangent_values: tuple[Tensor, ...]
    tensor_inputs: tuple[int, ...]

    @classmethod
    def of(cls, joint: JointGraph) -> StepInterface:
        """Reads the interface off a joint graph that has the branches of all tangents."""
        inputs = list(zip(joint.placeholders, joint.inputs, strict=True))
        tensors = (
            i
            for i, (node, role) in enumerate(inputs)
            if role.kind is not InputKind.TANGENT and isinstance(node.meta["val"], Tensor)
        )
        return cls(
            gradient_tangents(joint),
            _gradient_values(joint),
            tuple(n.meta["val"] for n, role in inputs if role.kind is InputKind.TANGENT),
            tuple(tensors),
        )


def gradient_tangents(joint: JointGraph) -> tuple[frozenset[int], ...]:
    """Computes for each primal the tangents that its gradient depends on; eager leaves a gradient of none None.

    A gradient that is a constant (that of ``sign`` is zeros) arrives with any of them.
    """
    behind = tangents_behind(joint)
    every = frozenset(range(sum(role.kind is InputKind.TANGENT for role in joint.inputs)))
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    gradients = (node for node, role in results if role.kind is OutputKind.GRADIENT)
    return tuple(frozenset() if node is None else behind[node] or every for node in gradients)


def _gradient_values(joint: JointGraph) -> tuple[Tensor | None, ...]:
    """Returns for each primal the fake value of its gradient."""
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    gradients = (node for node, role in results if role.kind is OutputKind.GRADIENT)
    return tuple(None if node is None else node.meta["val"] for node in gradients)
