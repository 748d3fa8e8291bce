"""Canonicalize: lossless rewrites that shrink what the backward pass needs.

Which tensors may be lossy is decided by their readers, so a saved tensor's uses are split first: readers that
need only a predicate get a mask (later one bit an element), readers that need only a shape get a shape, and
readers that ignore an argument lose it. Every rewrite gives the very same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

import fxhybrid.ops.masks  # noqa: F401  (registers keep_mask and apply_mask)
from fxhybrid.capture.joint_graph import TAG, JointGraph, NodeTag, OutputKind, Phase, phase_of, storages
from fxhybrid.passes.graph_edit import (
    PlainGraph,
    backward_nodes,
    call,
    joint_module,
    memory_format_of,
    tangent_free,
)
from fxhybrid.passes.loss_heads import slice_losses
from fxhybrid.passes.low_memory_backward import (
    chunk_batch_norm,
    chunk_batch_norm_by_pixels,
    parameter_gradients_first,
    split_convolution_gradients,
    split_grouped_convolution_gradients,
)
from fxhybrid.passes.storages import is_random

aten = torch.ops.aten
Pass = Callable[[JointGraph], None]


def canonicalize(joint: JointGraph, *, reordered: bool = False) -> JointGraph:
    """Returns a new joint graph after all rewrites; ``joint`` stays as it is.

    Args:
        joint: as captured, or in other layouts.
        reordered: whether sums may be taken in another order; without, every rewrite is lossless.
    """
    graph = PlainGraph()
    twins: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(joint.module.graph, twins))
    for node, twin in twins.items():
        twin.meta.clear()
        twin.meta.update({"val": node.meta.get("val"), TAG: node.meta[TAG]})
    graph.output_node().meta = {TAG: NodeTag(Phase.BACKWARD)}
    result = JointGraph(joint_module(joint.module, graph), joint.inputs, joint.outputs)
    for rewrite in REORDERING if reordered else PASSES:
        rewrite(result)
    _erase_unused(result)
    graph.lint()
    result.module.recompile()
    return result


def drop_copies(joint: JointGraph) -> None:
    """A copy in the same layout is what it copies, since nothing in the graph is changed in place.

    What comes from outside or is returned stays apart: callers may change it. So do copies that have views.
    """
    nodes = list(joint.module.graph.nodes)
    shared = Counter(storage for node in nodes for storage in set(storages(node.meta.get("val"))))
    outside = [*joint.placeholders, *(node for node in joint.output_nodes if node is not None)]
    kept = {storage for node in outside for storage in storages(node.meta["val"])}
    for node in joint.module.graph.find_nodes(op="call_function", target=aten.clone.default):
        source, copied = node.args[0], node.meta["val"]
        own = source.meta["val"]
        (of_own,), (of_copied,) = storages(own), storages(copied)
        n_bytes, n_copied = (value.untyped_storage().nbytes() for value in (own, copied))
        is_same = own.stride() == copied.stride() and n_bytes == n_copied
        if is_same and shared[of_copied] == 1 and not kept.intersection((of_own, of_copied)):
            node.replace_all_uses_with(source)
            joint.module.graph.erase_node(node)


def drop_unused_statistics(joint: JointGraph) -> None:
    """A batch norm in training mode ignores the running statistics in its backward pass."""
    for node in joint.module.graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if node.args[7] is True:
            node.args = (*node.args[:3], None, None, *node.args[5:])


def masks_for_predicates(joint: JointGraph) -> None:
    """ReLU and clamped units: the backward pass needs to know where, not how much."""
    free = tangent_free(joint)
    for node in backward_nodes(joint):
        if node.target is aten.threshold_backward.default:
            gradient, x, lower = node.args
            upper = None
        elif node.target is aten.hardtanh_backward.default:
            gradient, x, lower, upper = node.args
        else:
            continue
        if x not in free:
            continue
        with joint.module.graph.inserting_before(node):
            mask = call(joint, torch.ops.fxhybrid.keep_mask.default, (x, float(lower), upper), Phase.BACKWARD)
            new = call(joint, torch.ops.fxhybrid.apply_mask.default, (gradient, mask), Phase.BACKWARD)
        if new.meta["val"].stride() != node.meta["val"].stride():
            joint.module.graph.erase_node(new)
            joint.module.graph.erase_node(mask)
            continue
        new.meta["val"] = node.meta["val"]  # views further down share this value's storage
        node.replace_all_uses_with(new)
        joint.module.graph.erase_node(node)


_SHAPE_ONLY = {
    aten.max_pool2d_with_indices_backward.default: 1,
    aten.avg_pool2d_backward.default: 1,
    aten._adaptive_avg_pool2d_backward.default: 1,
}


def shapes_for_pools(joint: JointGraph) -> None:
    """Pooling gradients read only the shape of the pool's input: four bytes, expanded, serve as well."""
    for node in backward_nodes(joint):
        position = _SHAPE_ONLY.get(node.target)
        if position is None:
            continue
        value = node.args[position].meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        with joint.module.graph.inserting_before(node):
            if value.is_contiguous():
                one = call(joint, aten.empty.memory_format, ([1] * value.dim(),), Phase.BACKWARD, options)
                shape = call(joint, aten.expand.default, (one, list(value.shape)), Phase.BACKWARD)
            elif value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
                # The kernels take the memory format from this argument, and four bytes have none but the usual.
                options["memory_format"] = torch.channels_last
                shape = call(joint, aten.empty.memory_format, (list(value.shape),), Phase.BACKWARD, options)
            else:
                continue
        node.args = (*node.args[:position], shape, *node.args[position + 1 :])


def snapshot_overwritten(joint: JointGraph) -> None:
    """What the step overwrites is copied first if the backward pass reads it."""
    pairs = zip(joint.placeholders, joint.inputs, strict=True)
    for placeholder in [node for node, role in pairs if role.mutated]:
        readers = [n for n in placeholder.users if n.op != "output" and phase_of(n) is Phase.BACKWARD]
        if not readers:
            continue
        last = joint.placeholders[-1]
        with joint.module.graph.inserting_after(last):
            clone = call(joint, aten.clone.default, (placeholder,), Phase.FORWARD)
        for reader in readers:
            reader.replace_input_with(placeholder, clone)


def hoist_predicates(joint: JointGraph) -> None:
    """Bool tensors that backward computes from forward tensors alone may as well be made in the forward pass.

    Each is moved to right behind its last input, so that a plan can keep the mask and drop what it came from.
    """
    free = tangent_free(joint)
    for node in list(joint.module.graph.nodes):
        value = node.meta.get("val")
        if phase_of(node) is Phase.FORWARD or node not in free or not isinstance(value, torch.Tensor):
            continue
        if value.dtype is torch.bool:
            _hoist(joint, node)


def _hoist(joint: JointGraph, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if phase_of(source) is Phase.BACKWARD:
            _hoist(joint, source)
    sources = [n for n in node.all_input_nodes if n.op != "placeholder"]
    anchor = max(sources, default=joint.placeholders[-1])  # nodes compare by their place in the graph
    anchor.append(node)
    node.meta[TAG] = replace(node.meta[TAG], phase=Phase.FORWARD)


def own_gradients(joint: JointGraph) -> None:
    """Every gradient gets a storage of its own in its parameter's layout.

    Autograd then takes it as ``.grad`` instead of copying it, which would be memory that no plan knows of.
    """
    inputs = joint.placeholders
    taken: set[int] = {s for node in inputs for s in storages(node.meta["val"])}
    output = joint.module.graph.output_node()
    results = list(joint.output_nodes)
    for position, (node, role) in enumerate(zip(results, joint.outputs, strict=True)):
        if node is None or role.kind is not OutputKind.GRADIENT:
            continue
        value, like = node.meta["val"], inputs[role.of].meta["val"]
        owned = not taken.intersection(storages(value)) and phase_of(node) is Phase.BACKWARD
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        taken.update(storages(value))
        layout = memory_format_of(like)
        if (owned and whole and value.stride() == like.stride()) or layout is None:
            continue
        with joint.module.graph.inserting_before(output):
            if owned and whole and _same_order(value, like):
                arguments = (node, list(like.shape), list(like.stride()))
                results[position] = call(joint, aten.as_strided.default, arguments, Phase.BACKWARD)
            else:
                results[position] = call(joint, aten.clone.default, (node,), Phase.BACKWARD, {"memory_format": layout})
    output.args = (tuple(results),)


def _same_order(value: torch.Tensor, like: torch.Tensor) -> bool:
    """Tells whether elements have the same places in memory; a dimension of one element has any stride."""
    strides = zip(value.shape, value.stride(), like.stride(), strict=True)
    return all(own == other for size, own, other in strides if size > 1) and value.storage_offset() == 0


def _erase_unused(joint: JointGraph) -> None:
    for node in reversed(list(joint.module.graph.nodes)):
        unused = node.op == "call_function" and not node.users and not is_random(node)
        if unused and storages(node.meta.get("val")):
            joint.module.graph.erase_node(node)


PASSES: tuple[Pass, ...] = (
    drop_copies,
    slice_losses,
    drop_unused_statistics,
    masks_for_predicates,
    shapes_for_pools,
    snapshot_overwritten,
    hoist_predicates,
    own_gradients,
    chunk_batch_norm,
    split_convolution_gradients,
    parameter_gradients_first,
)
# The same where sums may be taken in another order.
REORDERING: tuple[Pass, ...] = (
    chunk_batch_norm_by_pixels,
    *(split_grouped_convolution_gradients if each is split_convolution_gradients else each for each in PASSES),
)
