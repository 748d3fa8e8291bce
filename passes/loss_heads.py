"""Loss heads: cross entropy over many classes in forms that hold less at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxhybrid.ops.sliced_loss  # noqa: F401  (registers the operators named below)
from fxhybrid.capture.joint_graph import JointGraph, Phase, phase_of
from fxhybrid.passes.graph_edit import call, copy_of, new_parts

aten, own = torch.ops.aten, torch.ops.fxhybrid
FEWEST_CLASSES = 1024  # whatever the number of rows, so that fewer rows never take more memory
_LOSS = (
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
    aten._log_softmax_backward_data.default,
)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def slice_losses(joint: JointGraph) -> None:
    """Computes log probabilities some rows at a time, anew in the backward pass, where only the loss reads them."""
    for node in joint.module.graph.find_nodes(op="call_function", target=aten._log_softmax.default):
        names = _with_detached(node)
        found = _loss(node, names)
        if found is None:
            continue
        loss, of_log, of_logits = found
        logits, (_, target, _, reduction, ignore_index) = node.args[0], loss.args
        with joint.module.graph.inserting_before(loss):
            new = call(joint, own.sliced_nll.default, (logits, target, reduction, ignore_index), Phase.FORWARD)
        with joint.module.graph.inserting_before(of_logits):
            arguments = (of_log.args[0], logits, target, reduction, ignore_index, of_log.args[6])
            result = call(joint, own.sliced_nll_backward.default, arguments, Phase.BACKWARD)
        for old, twin in ((loss, new), (of_logits, result)):
            twin.meta["val"] = old.meta["val"]  # views further down share this value's storage
            old.replace_all_uses_with(twin)
        for old in (of_logits, of_log, loss, *reversed(names)):
            joint.module.graph.erase_node(old)


def _with_detached(node: fx.Node) -> list[fx.Node]:
    """Lists a node and what only stands for it."""
    names = [node]
    for name in names:  # grows
        names += [user for user in name.users if user.target is aten.detach.default]
    return names


def _loss(node: fx.Node, names: Sequence[fx.Node]) -> tuple[Any, Any, Any] | None:
    """Returns loss, gradient of the log probabilities and of the logits; None where anything else reads them."""
    readers: list[Any] = [user for name in names for user in name.users if user not in names]
    if sorted(map(str, (reader.target for reader in readers))) != sorted(map(str, _LOSS)):
        return None
    loss, of_log, of_logits = (next(r for r in readers if r.target is target) for target in _LOSS)
    logits: Any = node.args[0]
    value = logits.meta["val"]
    plain = value.dim() == 2 and value.is_contiguous() and value.dtype in (torch.float32, torch.float64)
    in_forward = phase_of(node) is phase_of(loss) is Phase.FORWARD and phase_of(of_log) is Phase.BACKWARD
    if not (plain and in_forward) or node.meta["val"].dtype is not value.dtype or loss.args[2] is not None:
        return None
    if set(of_log.users) != {of_logits} or value.shape[1] < FEWEST_CLASSES:
        return None
    return loss, of_log, of_logits


def multiply_by_slices(joint: JointGraph) -> JointGraph:
    """Takes the products of a loss head from slices of the logits' gradient, where nothing else reads that.

    The weight's gradient is summed in another order than ATen's.

    Args:
        joint: without the branches of tangents that do not arrive; stays as it is.
    """
    if not joint.module.graph.find_nodes(op="call_function", target=own.sliced_nll_backward.default):
        return joint
    result = copy_of(joint)
    graph = result.module.graph
    for node in graph.find_nodes(op="call_function", target=own.sliced_nll_backward.default):
        head = _head(node)
        if head is None or not _brought_before(min(head.products), head):
            continue
        with graph.inserting_before(min(head.products)):
            arguments = (*node.args, head.of_hidden.args[1], head.of_weight.args[1], head.of_bias is not None)
            new = call(result, own.sliced_nll_products.default, arguments, Phase.BACKWARD)
            made = [old.meta["val"] for old in head.products]  # views further down share their storages
            new.meta["val"] = (*made, *new.meta["val"][len(made) :])
            parts = new_parts(result, new, len(made))
        for old, part in zip(head.products, parts, strict=True):
            old.replace_all_uses_with(part)
            graph.erase_node(old)
        for view in reversed(head.views):
            graph.erase_node(view)
    graph.lint()
    result.module.recompile()
    return result


def has_sliced_products(joint: JointGraph) -> bool:
    """Says whether the products of a loss head are taken from slices."""
    return bool(joint.module.graph.find_nodes(op="call_function", target=own.sliced_nll_products.default))


def _brought_before(first: fx.Node, head: _Head) -> bool:
    """Moves weight and input of the layer, where they are views, before the first product; says whether they are."""
    operands = [head.of_hidden.args[1], head.of_weight.args[1]]
    late = [operand for operand in operands if first < operand]
    if any(view.target is not aten.t.default or first < view.args[0] for view in late):
        return False
    for view in late:
        first.prepend(view)
    return True


@dataclass(frozen=True)
class _Head:
    """Holds the products of a loss head.

    Attributes:
        of_hidden: gradient of the logits by the layer's weight.
        of_weight: the same, transposed, by the layer's input.
        of_bias: its sum over the rows; None where there is none.
        views: of the gradient, itself first, each behind what it is of.
    """

    of_hidden: Any
    of_weight: Any
    of_bias: Any
    views: Sequence[fx.Node]

    @property
    def products(self) -> list[Any]:
        """All that reads the gradient."""
        return [node for node in (self.of_hidden, self.of_weight, self.of_bias) if node is not None]


def _head(node: fx.Node) -> _Head | None:
    """Returns what reads the gradient of the logits; None where that is anything but an output layer."""
    readers: list[fx.Node] = []
    shape, views = node.meta["val"].shape, [node]
    for view in views:  # grows
        for user in view.users:
            (views if user.target in VIEWS or user.target is aten.t.default else readers).append(user)
    whole = [view for view in views if view.meta["val"].shape == shape]
    turned = [view for view in views if view.target is aten.t.default and view.args[0] in whole]
    roles = {}
    for reader in readers:
        source, second = reader.args[0], reader.args[1] if len(reader.args) > 1 else None
        if reader.target is aten.mm.default and second not in views and source in (*whole, *turned):
            role = "of_hidden" if source in whole else "of_weight"
        elif reader.target is aten.sum.dim_IntList and source in whole and reader.args[1:] == ([0], True):
            role = "of_bias"
        else:
            return None
        roles[role] = reader
    complete = len(roles) == len(readers) and {"of_hidden", "of_weight"} <= roles.keys()
    return _Head(roles["of_hidden"], roles["of_weight"], roles.get("of_bias"), views) if complete else None
