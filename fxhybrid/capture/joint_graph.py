"""The joint graph and the roles of what goes in and comes out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx


class InputKind(Enum):
    """What a placeholder of the joint graph stands for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    USER_INPUT = "user input"
    SIZE = "size"  # a number that Dynamo passes along with symbolic sizes
    TANGENT = "tangent"


class OutputKind(Enum):
    """What an output of the joint graph stands for."""

    MUTATION = "mutation"
    USER_OUTPUT = "user output"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class InputRole:
    """One placeholder.

    Attributes:
        kind: what it stands for.
        name: parameter or buffer name, or the position of an input or tangent.
        mutated: the step writes new contents into it.
    """

    kind: InputKind
    name: str
    mutated: bool = False


@dataclass(frozen=True)
class OutputRole:
    """One output; ``of`` is the input that is mutated or whose gradient this is, or the output's position."""

    kind: OutputKind
    of: int


class Phase(Enum):
    """Which half of the step a node belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Origin:
    """Names a place in the user's model.

    Attributes:
        module: dotted path of the innermost module; ``"loss"`` outside the model, ``""`` for the model itself.
        kind: class of that module, "" outside the model.
        line: ``file.py:12``, the last frame that is no library's; "" where it is not known.
    """

    module: str
    kind: str
    line: str

    def __str__(self) -> str:
        return " ".join((self.module or "the model", *([f"({self.line})"] if self.line else [])))


@dataclass(frozen=True)
class NodeTag:
    """The one thing that fxhybrid writes into ``node.meta`` (under ``TAG``).

    Attributes:
        phase: which half of the step the node belongs to.
        origin: where in the model it was traced; None for what passes made.
    """

    phase: Phase
    origin: Origin | None = None


TAG = "fxhybrid"


@dataclass(frozen=True, eq=False)
class JointGraph:
    """One functional forward + backward graph of ATen ops.

    Attributes:
        module: placeholders are primals, then tangents; every node has ``meta["val"]`` and a ``NodeTag``.
        inputs: a role for each placeholder.
        outputs: a role for each output; ``None`` outputs (no gradient) are GRADIENT roles too.
    """

    module: fx.GraphModule
    inputs: tuple[InputRole, ...]
    outputs: tuple[OutputRole, ...]

    @property
    def placeholders(self) -> list[fx.Node]:
        """Placeholder nodes in order."""
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    @property
    def tangents(self) -> list[fx.Node]:
        """Placeholders that stand for gradients of outputs, in order."""
        return [n for n, role in zip(self.placeholders, self.inputs, strict=True) if role.kind is InputKind.TANGENT]

    @property
    def output_nodes(self) -> tuple[fx.Node | None, ...]:
        """What the graph returns, aligned with ``outputs``."""
        result: tuple[fx.Node | None, ...] = tuple(self.module.graph.output_node().args[0])  # type: ignore[arg-type]
        return result

    def __str__(self) -> str:
        kinds = [role.kind.value for role in self.inputs]
        summary = ", ".join(f"{kinds.count(k.value)} {k.value}s" for k in InputKind)
        return f"JointGraph: {len(self.module.graph.nodes)} nodes; {summary}"


def phase_of(node: fx.Node) -> Phase:
    """The half of the step that ``node`` belongs to."""
    tag: NodeTag = node.meta[TAG]
    return tag.phase


def storages(value: Any) -> list[int]:
    """Identity of the storage behind each tensor of a (possibly nested) fake value."""
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()._cdata]
    if isinstance(value, (list, tuple)):
        return [s for item in value for s in storages(item)]
    return []


def node_name(node: fx.Node) -> str:
    """The node's text in messages."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
