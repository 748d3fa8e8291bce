"""Tells which nodes allocate, and which only look at what others allocated.

A view shares its base's storage, so memory is counted, and decided, per storage. The layout numbers every
storage that the step makes and lists the ops that make and read them; views and ``getitem`` disappear into
their readers.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxhybrid.capture.joint_graph import InputKind, JointGraph, OutputKind, Phase, node_name, phase_of, storages
from fxhybrid.ops.hand_on import HAND_ON
from fxhybrid.torch_internals import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Storage:
    """Holds one allocation of the step; ``base`` is the node whose value covers it, if any node reads it."""

    name: str
    size_bytes: int
    base: fx.Node | None


@dataclass(frozen=True)
class OpCall:
    """Holds one call that allocates or computes; inputs and outputs are storage indices.

    ``fused_with`` is the forward op whose mask this backward op applies, if nothing else reads that mask.
    """

    name: str
    node: fx.Node
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recomputable: bool
    pinned: bool
    fused_with: int | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """Holds the storages and ops of a joint graph.

    Attributes:
        storages: every allocation, in order of birth.
        forward: forward ops in order.
        backward: backward ops in order.
        storages_of: indices of the storages behind a node's value (resident ones left out).
        outputs: storages behind user outputs.
        mutations: storages copied into buffers or inputs after the forward pass.
        gradients: storages behind gradients.
    """

    storages: tuple[Storage, ...]
    forward: tuple[OpCall, ...]
    backward: tuple[OpCall, ...]
    storages_of: Mapping[fx.Node, tuple[int, ...]]
    outputs: tuple[int, ...]
    mutations: tuple[int, ...]
    gradients: tuple[int, ...]

    @cached_property
    def op_nodes(self) -> frozenset[fx.Node]:
        """Returns the nodes that are ops; all other calls are views and getitems."""
        return frozenset(op.node for op in self.forward + self.backward)


def layout_of(joint: JointGraph) -> Layout:
    """Builds the layout of ``joint``; reads shapes and aliases from ``meta["val"]`` only."""
    return _Builder(joint).build()


def is_random(node: fx.Node) -> bool:
    """Tells whether the node draws random numbers (attention ops only if their dropout is on)."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            value = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(value != 0)
    if target is aten.native_dropout.default:
        return bool(node.args[2]) if len(node.args) > 2 else True
    return True


def recompute_form(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Returns another call with the same leading outputs that leaves running statistics alone, if there is one."""
    if node.target is aten._native_batch_norm_legit_functional.default and node.args[5] is True:
        x, weight, bias, _, _, training, momentum, eps = node.args
        return aten._native_batch_norm_legit.no_stats, (x, weight, bias, training, momentum, eps)
    return None


def fused_form(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Returns the call that applies a mask without having it: ``(target, arguments)`` over the mask's own sources."""
    if node.target is not torch.ops.fxhybrid.apply_mask.default:
        return None
    gradient, mask = node.args
    if not isinstance(mask, fx.Node) or mask.target is not torch.ops.fxhybrid.keep_mask.default:
        return None
    x, lower, upper = mask.args
    if len(mask.users) > 1 or phase_of(mask) is not Phase.FORWARD:
        return None
    if upper is None:
        return aten.threshold_backward.default, (gradient, x, lower)
    return aten.hardtanh_backward.default, (gradient, x, lower, upper)


class _Builder:
    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.storage_index: dict[int, int] = {}
        self.found: list[Storage] = []
        self.storages_of: dict[fx.Node, tuple[int, ...]] = {}
        self.overwritten: set[int] = set()
        self.name_counts: Counter[str] = Counter()
        self.ops: dict[Phase, list[OpCall]] = {Phase.FORWARD: [], Phase.BACKWARD: []}

    def build(self) -> Layout:
        for node, role in zip(self.joint.placeholders, self.joint.inputs, strict=True):
            if role.mutated:
                self.overwritten.update(storages(node.meta["val"]))
        for node in self.joint.module.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
        return Layout(
            tuple(self.found),
            tuple(self.ops[Phase.FORWARD]),
            tuple(self.ops[Phase.BACKWARD]),
            self.storages_of,
            self._role_storages(OutputKind.USER_OUTPUT),
            self._role_storages(OutputKind.MUTATION),
            self._role_storages(OutputKind.GRADIENT),
        )

    def _visit(self, node: fx.Node) -> None:
        behind = storages(node.meta.get("val"))
        read = {s for n in node.all_input_nodes for s in storages(n.meta.get("val"))}
        is_view = node.target is operator.getitem or (behind and set(behind) <= read and not is_random(node))
        if not is_view:
            self._add_op(node, [s for s in dict.fromkeys(behind) if s not in read])
        self.storages_of[node] = self._known(behind)

    def _add_op(self, node: fx.Node, made: list[int]) -> None:
        operator_name = node_name(node)
        name = f"{operator_name}.{self.name_counts[operator_name]}"
        self.name_counts[operator_name] += 1
        sizes = dict(zip(storages(node.meta.get("val")), _storage_bytes(node.meta.get("val")), strict=True))
        outputs = []
        for position, storage in enumerate(made):
            self.storage_index[storage] = len(self.found)
            outputs.append(len(self.found))
            label = name if len(made) == 1 else f"{name}:{position}"
            self.found.append(Storage(label, sizes[storage], _base(node, storage)))
        inputs = self._known(s for n in node.all_input_nodes for s in storages(n.meta.get("val")))
        random = is_random(node)
        again = not random and not self._reads_overwritten(node) and node.target is not HAND_ON  # its input may be gone
        pinned = random or not outputs  # an op without outputs is there for its effect: a check that raises
        call = OpCall(name, node, inputs, tuple(outputs), again and not pinned, pinned, self._fused_with(node))
        self.ops[phase_of(node)].append(call)

    def _fused_with(self, node: fx.Node) -> int | None:
        if fused_form(node) is None:
            return None
        return next(i for i, op in enumerate(self.ops[Phase.FORWARD]) if op.node is node.args[1])

    def _reads_overwritten(self, node: fx.Node) -> bool:
        """Tells whether running the node again would read contents that the step has replaced by then."""
        form = recompute_form(node)
        arguments = form[1] if form else (node.args, node.kwargs)
        nodes: list[fx.Node] = []
        fx.node.map_arg(arguments, nodes.append)
        return any(s in self.overwritten for n in nodes for s in storages(n.meta.get("val")))

    def _known(self, behind: Iterable[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.storage_index[s] for s in behind if s in self.storage_index))

    def _role_storages(self, kind: OutputKind) -> tuple[int, ...]:
        behind = (
            s
            for node, role in zip(self.joint.output_nodes, self.joint.outputs, strict=True)
            if role.kind is kind and node is not None
            for s in storages(node.meta["val"])
        )
        return self._known(behind)


def _base(node: fx.Node, storage: int) -> fx.Node | None:
    """Returns the node whose value is the whole storage: the op itself or the getitem of one of its outputs."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return node
    for user in node.users:
        if user.target is operator.getitem and storages(user.meta["val"]) == [storage]:
            return user
    return None


def _storage_bytes(value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage().nbytes()]
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in _storage_bytes(item)]
    return []


def resident_nodes(joint: JointGraph) -> list[fx.Node]:
    """Returns the placeholders that are alive through the whole step: all but tangents."""
    pairs = zip(joint.placeholders, joint.inputs, strict=True)
    return [node for node, role in pairs if role.kind is not InputKind.TANGENT]
