"""Prune: the backward pass for the output gradients that arrive.

Autograd does not run the branch of an output that gets no gradient. A traced joint graph has all branches; filling in
zeros is not the same, as 0 * inf is NaN, and it costs the branch's time and memory.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

import fxhybrid.ops.batch_norm
import fxhybrid.ops.recurrent
import fxhybrid.ops.take_gradient  # noqa: F401  (likewise)
from fxhybrid.capture.fake_tensor_fixes import kernel_norms
from fxhybrid.capture.joint_graph import TAG, InputKind, JointGraph, NodeTag, OutputKind, Phase, phase_of
from fxhybrid.capture.kernel_layouts import kernel_layouts
from fxhybrid.passes.graph_edit import PlainGraph, joint_module, memory_format_of
from fxhybrid.torch_internals import OpOverload

aten = torch.ops.aten
_EFFECTS = (torch.ops.fxhybrid.take_gradient.default,)  # needed although nothing reads what they make
_BATCH_NORMS = (aten.native_batch_norm_backward.default, torch.ops.fxhybrid.batch_norm_backward.default)
_COPIES = (aten.slice_backward.default, aten.select_backward.default)  # a strided copy is no slower
_BIAS = 2  # of a convolution's gradients
_LAYOUT_BOUND = (aten.view.default, aten._unsafe_view.default)  # they fail where strides are not the traced ones


def tangents_behind(joint: JointGraph) -> dict[fx.Node, frozenset[int]]:
    """Computes for each node the positions of the tangents that its value depends on."""
    behind: dict[fx.Node, frozenset[int]] = {}
    n_tangents = 0
    for node, role in zip(joint.placeholders, joint.inputs, strict=True):
        is_tangent = role.kind is InputKind.TANGENT
        behind[node] = frozenset([n_tangents]) if is_tangent else frozenset()
        n_tangents += is_tangent
    for node in joint.module.graph.nodes:
        if node.op != "placeholder":
            behind[node] = frozenset().union(*(behind[n] for n in node.all_input_nodes))
    return behind


def prune_tangents(joint: JointGraph, absent: frozenset[int]) -> JointGraph:
    """Builds the joint graph in which some output gradients do not arrive.

    Sums lose the missing summand; any other operator that reads a missing gradient among others gets zeros for it, as
    autograd gives to an operator of several outputs. Gradients that depend on missing ones only become None. The
    forward half and all placeholders stay, under their names.

    Args:
        joint: with nodes tagged by phase, rewritten by a plan or not.
        absent: positions of the missing tangents among all.
    """
    return _Pruner(joint, absent).run()


def without_missing(node: fx.Node, missing: AbstractSet[fx.Node]) -> tuple[fx.node.Argument, ...]:
    """Returns a node's arguments less the missing ones where its operator takes fewer; others stay."""
    if missing.isdisjoint(node.all_input_nodes) or not isinstance(node.target, OpOverload):
        return node.args
    if node.target is torch.ops.fxhybrid.recurrent_backward.default:
        kind, gradients, outputs, *rest = cast(tuple[Any, ...], node.args)
        given = [(g, i) for g, i in zip(gradients, outputs, strict=True) if g not in missing]
        return (kind, [g for g, _ in given], [i for _, i in given], *rest)
    optional = [isinstance(a.type, torch.OptionalType) for a in node.target._schema.arguments]
    return tuple(
        None if may_be_none and argument in missing else argument
        for argument, may_be_none in zip(node.args, optional, strict=False)
    )


def _may_view(target: Any) -> bool:
    is_view = isinstance(target, OpOverload) and target.is_view
    return is_view or target in (aten.reshape.default, operator.getitem)


def _layouts(value: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride()) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _has_moved(node: fx.Node, copy: fx.Node) -> bool:
    """Whether a node's copy lies in memory in another way."""
    old, new = node.meta["val"], copy.meta["val"]
    return old is not new and _layouts(old) != _layouts(new)


def _run(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operator on fake tensors."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    mode: Any = getattr(tensors[0], "fake_mode", None)
    with mode, torch.no_grad(), kernel_norms(), kernel_layouts():
        return target(*args, **kwargs)


class _Pruner:
    """Copies a joint graph node by node, without what is missing."""

    def __init__(self, joint: JointGraph, absent: frozenset[int]) -> None:
        self.joint = joint
        behind = tangents_behind(joint)
        self.missing = {node for node, tangents in behind.items() if tangents and tangents <= absent}
        self.graph = PlainGraph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.biases: dict[fx.Node, fx.Node] = {}  # by convolution: what computes the bias's gradient alone

    def run(self) -> JointGraph:
        for node in self.joint.module.graph.nodes:
            if node.op == "output":
                self._emit_output(node)
            elif node.op == "placeholder" or node not in self.missing:
                self.new[node] = self._summand(node) or self._bias(node) or self._copy(node)
        self._erase_dead()
        return JointGraph(joint_module(self.joint.module, self.graph), self.joint.inputs, self.joint.outputs)

    def _summand(self, node: fx.Node) -> fx.Node | None:
        """The other summand of a sum with one missing, where it has the sum's shape and type."""
        if node.target is not aten.add.Tensor or node.kwargs or not self.missing.intersection(node.all_input_nodes):
            return None
        (kept,) = (n for n in node.args if n not in self.missing)
        if not isinstance(kept, fx.Node):
            return None
        value, total = kept.meta["val"], node.meta["val"]
        return self.new[kept] if (value.shape, value.dtype) == (total.shape, total.dtype) else None

    def _copy(self, node: fx.Node) -> fx.Node:
        """Copies a node; what is missing among its arguments is left out, None or zeros."""
        args = without_missing(node, self.missing)
        needed: list[fx.Node] = []
        fx.node.map_arg((args, node.kwargs), needed.append)
        new = {n: self._zeros(n) if n in self.missing else self.new[n] for n in needed}
        if self._reads_one_layout(node, args, new):
            if node.target is aten.convolution_backward.default and cast(list[bool], args[-1])[_BIAS]:
                self.biases[node] = self._bias_alone(node, new)
            new = {n: self._as_traced(n, copy) for n, copy in new.items()}
        copied = self.graph.create_node(
            node.op,
            self._target(node),
            fx.node.map_arg(args, new.__getitem__),
            fx.node.map_arg(node.kwargs, new.__getitem__),
            node.name,
            node.type,
        )
        copied.meta = {"val": self._value(node, copied), TAG: node.meta[TAG]}
        return copied

    def _value(self, node: fx.Node, copied: fx.Node) -> Any:
        """The fake value; behind a sum that lost a summand, storages and strides follow from the one that is left."""
        old = node.meta.get("val")
        sources = [n for n in node.all_input_nodes if n not in self.missing]
        if node.op != "call_function" or all(self.new[n].meta["val"] is n.meta["val"] for n in sources):
            return old
        args, kwargs = fx.node.map_arg((copied.args, copied.kwargs), lambda n: n.meta["val"])
        new = _run(copied.target, args, kwargs)
        return new if _may_view(copied.target) or _layouts(new) != _layouts(old) else old

    def _reads_one_layout(self, node: fx.Node, args: Any, new: Mapping[fx.Node, fx.Node]) -> bool:
        """Whether an operator needs its arguments in the layout that it was traced with, and one is in another now.

        Kernels that have one layout only copy what comes in another; that copy is made here, where it is counted and
        what it is made from can go. So it is where eager's formula copies, of which a graph shows nothing where there
        was nothing to do, and where a convolution stands for an input gradient, whose kernel follows the input.
        """
        target = node.target
        if phase_of(node) is not Phase.BACKWARD or not isinstance(target, OpOverload):
            return False
        if not any(_has_moved(n, copy) for n, copy in new.items()):
            return False
        if target in (aten.convolution.default, aten.as_strided.default):
            return True
        if "backward" not in str(target) or torch.Tag.pointwise in target.tags or target in (*_BATCH_NORMS, *_COPIES):
            return False
        arguments, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: new[n].meta["val"])
        return _layouts(_run(target, arguments, kwargs)) == _layouts(node.meta["val"])

    def _bias_alone(self, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Emits a convolution's bias gradient: a sum over the output gradient, in the order in which that lies."""
        args = (*fx.node.map_arg(node.args[:-1], new.__getitem__), [False, False, True])
        alone = self.graph.call_function(aten.convolution_backward.default, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        alone.meta = {"val": _run(alone.target, values, {}), TAG: NodeTag(Phase.BACKWARD)}
        return alone

    def _bias(self, node: fx.Node) -> fx.Node | None:
        """Reads the bias's gradient where it was computed alone."""
        source = node.args[0] if node.target is operator.getitem and node.args[1] == _BIAS else None
        alone = self.biases.get(source) if isinstance(source, fx.Node) else None
        if alone is None:
            return None
        bias = self.graph.call_function(operator.getitem, (alone, _BIAS))
        bias.meta = {"val": alone.meta["val"][_BIAS], TAG: node.meta[TAG]}
        return bias

    def _as_traced(self, node: fx.Node, copy: fx.Node) -> fx.Node:
        """The copied node in the layout that the node was traced with, where a memory format gives that."""
        value = node.meta["val"]
        memory_format = memory_format_of(value) if isinstance(value, torch.Tensor) else None
        if memory_format is None or not _has_moved(node, copy):
            return copy
        clone = self.graph.call_function(aten.clone.default, (copy,), {"memory_format": memory_format})
        made = _run(clone.target, (copy.meta["val"],), {"memory_format": memory_format})
        clone.meta = {"val": made, TAG: NodeTag(Phase.BACKWARD)}
        return clone

    def _target(self, node: fx.Node) -> Any:
        """The operator; a view may be of another layout than it was traced with, and copies where autograd would.

        A summand that is left alone keeps its own strides, and so do the elementwise operators behind it.
        """
        is_backward = phase_of(node) is Phase.BACKWARD
        return aten.reshape.default if is_backward and node.target in _LAYOUT_BOUND else node.target

    def _zeros(self, node: fx.Node) -> fx.Node:
        """Emits zeros in the shape, strides and type of a missing value."""
        value: torch.Tensor = node.meta["val"]
        kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        layout = list(value.shape), list(value.stride())
        made = self.graph.call_function(aten.empty_strided.default, layout, kind)
        zeros = self.graph.call_function(aten.zeros_like.default, (made,))
        mode: Any = value.fake_mode  # type: ignore[attr-defined]
        with mode, torch.no_grad():  # in storages of their own: a missing value may be a part of another
            values = [torch.empty_strided(*layout, **kind)]
            values.append(torch.zeros_like(values[0]))
        for part, own in zip((made, zeros), values, strict=True):
            part.meta = {"val": own, TAG: NodeTag(Phase.BACKWARD)}
        return zeros

    def _emit_output(self, node: fx.Node) -> None:
        results = zip(self.joint.output_nodes, self.joint.outputs, strict=True)
        kept: list[fx.Node | None] = []
        for n, role in results:
            if n is None or (role.kind is OutputKind.GRADIENT and n in self.missing):
                kept.append(None)
            else:
                kept.append(self._as_traced(n, self.new[n]))
        self.graph.output(tuple(kept)).meta = {"val": None, TAG: node.meta[TAG]}

    def _erase_dead(self) -> None:
        """Drops what only served the missing branches: decodings and recomputations among them."""
        for node in reversed(self.graph.nodes):
            is_dead = node.op == "call_function" and not node.users and node.target not in _EFFECTS
            if is_dead and phase_of(node) is Phase.BACKWARD:
                self.graph.erase_node(node)
