"""Channels last: convolutions, and what lies between them, in the memory format in which the CPU computes them faster.

A group is a set of operators that follow their inputs' memory format, a convolution among them, connected by tensors.
Tensors are converted where they come into a group, and back where something else reads them, so that inputs, outputs
and gradients keep the user's layout. Weights stay as they are: kernels bring them into a layout of their own in any
case. Values are equal but for rounding: kernels take sums in another order.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxhybrid.capture.fake_tensor_fixes import contiguous_first, kernel_norms, own_fake_tensors
from fxhybrid.capture.joint_graph import TAG, JointGraph, NodeTag, OutputKind, phase_of
from fxhybrid.capture.kernel_layouts import kernel_layouts
from fxhybrid.ops.hand_on import HAND_ON
from fxhybrid.passes.graph_edit import PlainGraph, joint_module
from fxhybrid.passes.storages import is_random
from fxhybrid.torch_internals import FakeTensor, OpOverload

aten = torch.ops.aten
CHANNELS_LAST = torch.channels_last
TYPES = (torch.float32, torch.bfloat16)  # of convolutions that oneDNN takes
CONVOLUTIONS = frozenset([aten.convolution.default, aten.convolution_backward.default])
# Beside elementwise operators, these give their result in the memory format of what they read.
_FOLLOWING = CONVOLUTIONS | {
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
    aten.hardtanh_backward.default,
    aten.hardswish.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.softplus_backward.default,
    aten.mish_backward.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d_backward.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d_backward.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.detach.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
}
# Arguments that are no tensor of the group: a convolution's weight.
_OUTSIDE: dict[Any, int] = {aten.convolution.default: 1, aten.convolution_backward.default: 2}


@dataclass(frozen=True)
class Group:
    """Holds connected operators that may run in channels_last together.

    Attributes:
        number: of its first convolution among all of the graph's, which is the same for all sizes of inputs.
        nodes: the operators, in graph order.
    """

    number: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Crossing:
    """Says which images are in channels_last where they come into a graph from others of the step, or go to others.

    Attributes:
        inputs: positions of the inputs.
        outputs: positions of the outputs; their gradients come in channels_last, too.
    """

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


USUAL_LAYOUT = Crossing()


def channels_last_groups(joint: JointGraph) -> tuple[Group, ...]:
    """Finds the groups of a captured graph, in the order of their first operators.

    Groups whose convolutions read channels_last already are left out.
    """
    connected = nx.Graph()
    connected.add_nodes_from(node for node in joint.module.graph.nodes if _follows(node))
    for node in list(connected.nodes):
        connected.add_edges_from((node, made_by) for made_by in _makers(node) if made_by in connected)
    order = {node: i for i, node in enumerate(joint.module.graph.nodes)}
    convolutions = [node for node in order if node.target in CONVOLUTIONS]
    number = {node: i for i, node in enumerate(convolutions)}
    parts = (sorted(part, key=order.__getitem__) for part in nx.connected_components(connected))
    found = [part for part in parts if any(_would_change(node) for node in part)]
    groups = (Group(min(number[node] for node in part if node in number), tuple(part)) for part in found)
    return tuple(sorted(groups, key=lambda group: group.number))


def in_channels_last(
    joint: JointGraph, groups: Collection[Group], coming: Collection[fx.Node] = (), going: Collection[int] = ()
) -> JointGraph:
    """Builds the joint graph in which the operators of these groups run in channels_last; names of nodes stay.

    Args:
        joint: in eager's layouts.
        groups: of its operators.
        coming: inputs and tangents that are in channels_last as they come.
        going: positions of outputs that are left in channels_last.
    """
    if not groups and not coming:
        return joint
    members = frozenset(node for group in groups for node in group.nodes)
    return _Converter(joint, members, frozenset(coming), frozenset(going)).run()


def images_that_come(joint: JointGraph) -> frozenset[int]:
    """Returns the positions of the inputs from other graphs that a laid out joint graph converts to channels_last."""
    positions = {node: i for i, node in enumerate(joint.placeholders)}
    handed = joint.module.graph.find_nodes(op="call_function", target=HAND_ON)
    return frozenset(positions[n.args[0]] for n in handed if any(_converts_to(u, CHANNELS_LAST) for u in n.users))


def images_that_go(joint: JointGraph) -> frozenset[int]:
    """Returns the positions of the outputs that a laid out joint graph converts from channels_last."""
    results = zip(joint.output_nodes, joint.outputs, strict=True)
    outputs = ((node, role.of) for node, role in results if role.kind is OutputKind.USER_OUTPUT and node is not None)
    converted = ((node, i) for node, i in outputs if _converts_to(node, torch.contiguous_format))
    return frozenset(i for node, i in converted if is_channels_last(node.all_input_nodes[0].meta["val"]))


def _converts_to(node: fx.Node, layout: torch.memory_format) -> bool:
    is_image = isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == 4
    return is_image and node.target is aten.clone.default and node.kwargs.get("memory_format") is layout


def _follows(node: fx.Node) -> bool:
    """Tells whether an operator's result is in channels_last where what it reads is."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or is_random(node):
        return False
    if target not in _FOLLOWING and torch.Tag.pointwise not in target.tags:
        return False
    tensors = [n.meta["val"] for n in _operands(node)]
    if target in CONVOLUTIONS and tensors[0].dtype not in TYPES:
        return False
    return any(t.dim() == 4 for t in tensors) and all(t.device.type == "cpu" for t in tensors)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Lists what an operator reads from its group, if that is converted: all tensors but a convolution's weight."""
    outside = _OUTSIDE.get(node.target)
    found: list[fx.Node] = []
    fx.node.map_arg(tuple(a for i, a in enumerate(node.args) if i != outside), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), Tensor)]


def _makers(node: fx.Node) -> Iterator[fx.Node]:
    """Yields the operators that made the images that an operator reads."""
    for operand in _operands(node):
        value = operand.meta["val"]
        if value.dim() != 4:
            continue
        if operand.target is not operator.getitem:
            yield operand
            continue
        maker, position = operand.args
        assert isinstance(maker, fx.Node)
        if maker.target is not aten.convolution_backward.default or position == 0:  # else the weight's gradient
            yield maker


def _would_change(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS and not all(is_channels_last(n.meta["val"]) for n in _images(node))


def _images(node: fx.Node) -> list[fx.Node]:
    return [n for n in _operands(node) if n.meta["val"].dim() == 4]


def is_channels_last(value: Tensor) -> bool:
    """Tells whether an image tensor's channels are its fast dimension in memory; slices of such tensors count, too."""
    if value.is_contiguous(memory_format=CHANNELS_LAST):
        return True
    strides = [value.stride(dim) for dim in (0, 2, 3, 1) if value.shape[dim] > 1]
    return 0 not in strides and strides == sorted(strides, reverse=True)


@contextlib.contextmanager
def kernel_results() -> Iterator[None]:
    """Lets fake tensors be laid out as the CPU kernels' results are."""
    with kernel_norms(), kernel_layouts(), contiguous_first(), own_fake_tensors():
        yield


class _Converter:
    """Copies a joint graph node by node, with conversions where tensors come into and out of the members."""

    def __init__(
        self, joint: JointGraph, members: frozenset[fx.Node], coming: frozenset[fx.Node], going: frozenset[int]
    ) -> None:
        self.joint, self.members, self.coming, self.going = joint, members, coming, going
        self.graph = PlainGraph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.converted: dict[tuple[fx.Node, torch.memory_format], fx.Node] = {}

    def run(self) -> JointGraph:
        with kernel_results(), torch.no_grad():
            for node in self.joint.module.graph.nodes:
                if node.op == "output":
                    self._emit_output(node)
                elif node.op == "call_function":
                    self.new[node] = self._copy(node)
                else:
                    self.new[node] = self.graph.node_copy(node)
                    value = node.meta.get("val")
                    laid_out = _laid_out(value) if node in self.coming else value
                    self.new[node].meta = {"val": laid_out, TAG: node.meta[TAG]}
        return JointGraph(joint_module(self.joint.module, self.graph), self.joint.inputs, self.joint.outputs)

    def _copy(self, node: fx.Node) -> fx.Node:
        tag: NodeTag = node.meta[TAG]
        inside = set(_images(node)) if node in self.members else set()

        def argument(source: fx.Node) -> fx.Node:
            if node.target is HAND_ON:
                return self.new[source]
            return self._inside(source, tag) if source in inside else self._outside(source, tag)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), argument)
        copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        copied.meta = {"val": self._value(node, copied), TAG: tag}
        return copied

    def _inside(self, source: fx.Node, tag: NodeTag) -> fx.Node:
        new = self.new[source]
        return new if is_channels_last(new.meta["val"]) else self._clone(new, CHANNELS_LAST, tag)

    def _outside(self, source: fx.Node, tag: NodeTag, *, exactly: bool = False) -> fx.Node:
        new, old = self.new[source], source.meta.get("val")
        if not isinstance(old, Tensor) or _same_strides(new.meta["val"], old, exactly):
            return new
        return self._clone(new, torch.contiguous_format, tag)

    def _clone(self, source: fx.Node, layout: torch.memory_format, tag: NodeTag) -> fx.Node:
        if (source, layout) not in self.converted:
            clone = self.graph.call_function(aten.clone.default, (source,), {"memory_format": layout})
            clone.meta = {"val": _call(clone), TAG: NodeTag(tag.phase, tag.origin)}
            self.converted[source, layout] = clone
        return self.converted[source, layout]

    def _value(self, node: fx.Node, copied: fx.Node) -> Any:
        """Computes the fake value; that of the graph as it was captured stays where nothing is laid out differently."""
        old = node.meta.get("val")
        sources = zip(node.all_input_nodes, copied.all_input_nodes, strict=True)
        if all(new.meta["val"] is source.meta["val"] for source, new in sources):
            return old
        value = _call(copied)
        is_view = node.target is operator.getitem or getattr(node.target, "is_view", False)
        return value if is_view or _layouts(value) != _layouts(old) else old

    def _emit_output(self, node: fx.Node) -> None:
        """Returns gradients as they come, which get their parameters' layout later; all else is laid out as before.

        Not so outputs that go to other graphs as they are.
        """
        results = []
        for source, role in zip(self.joint.output_nodes, self.joint.outputs, strict=True):
            goes = role.kind is OutputKind.USER_OUTPUT and role.of in self.going
            if source is None or role.kind is OutputKind.GRADIENT or goes:
                results.append(source and self.new[source])
            else:
                results.append(self._outside(source, NodeTag(phase_of(source)), exactly=True))
        self.graph.output(tuple(results)).meta = {"val": None, TAG: node.meta[TAG]}


def _laid_out(image: FakeTensor) -> Tensor:
    with image.fake_mode:
        return image.contiguous(memory_format=CHANNELS_LAST)


def _call(node: fx.Node) -> Any:
    """Computes a call's fake value."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    mode: Any = getattr(next(iter(tensors), None), "fake_mode", None) or contextlib.nullcontext()
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _layouts(value: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride()) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _same_strides(one: Tensor, other: Tensor, exactly: bool) -> bool:
    """Compares strides; those of dimensions of one element matter only ``exactly``."""
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(a == b or (size <= 1 and not exactly) for size, a, b in pairs)
