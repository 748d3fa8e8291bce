"""Low-memory backward: operators in forms that hold less at once, with the very same results where they must be."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

import fxhybrid.ops.batch_norm  # noqa: F401  (registers batch_norm_backward)
from fxhybrid.capture.joint_graph import JointGraph, Phase, phase_of
from fxhybrid.passes.graph_edit import backward_nodes, call, output_parts

aten = torch.ops.aten
LARGE = 2  # batch norms of at least 1 / LARGE of the largest input run some channels at a time


def split_convolution_gradients(joint: JointGraph) -> None:
    """Computes weight and input gradient of a convolution one after the other.

    One call for both holds input, output gradient and input gradient together. The input gradient alone is a
    transposed convolution, which does not need the input, so that the input may be gone by then. On CPU both
    forms end in the same oneDNN primitive and give the same bits, but for groups in channels_last, which are left out.
    """
    _split_convolution_gradients(joint, _is_same_primitive)


def split_grouped_convolution_gradients(joint: JointGraph) -> None:
    """Does the same for groups in channels_last, too: sums are taken in another order."""
    _split_convolution_gradients(joint, lambda *_: True)


def _split_convolution_gradients(joint: JointGraph, fits: Callable[[torch.Tensor, torch.Tensor, int], bool]) -> None:
    for node in backward_nodes(joint):
        if node.target is not aten.convolution_backward.default:
            continue
        gradient, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = node.args
        value = x.meta["val"]
        if not (mask[0] and mask[1]) or transposed or not _is_onednn_convolution(value):
            continue
        if not fits(value, weight.meta["val"], groups):
            continue
        parts = output_parts(node)
        if 0 not in parts:
            continue
        sizes = [t.shape[2:] for t in (value, gradient.meta["val"], weight.meta["val"])]
        stride, padding, dilation = (_per_dimension(p, len(sizes[0])) for p in (stride, padding, dilation))
        rest = [
            x_size - ((out_size - 1) * step - 2 * pad + spread * (w_size - 1) + 1)
            for x_size, out_size, w_size, step, pad, spread in zip(*sizes, stride, padding, dilation, strict=True)
        ]
        with joint.module.graph.inserting_after(parts[max(parts)]):
            arguments = (gradient, weight, None, stride, padding, dilation, True, rest, groups)
            new = call(joint, aten.convolution.default, arguments, Phase.BACKWARD)
        if new.meta["val"].stride() != parts[0].meta["val"].stride():
            joint.module.graph.erase_node(new)
            continue
        new.meta["val"] = parts[0].meta["val"]
        parts[0].replace_all_uses_with(new)
        joint.module.graph.erase_node(parts[0])
        node.args = (*node.args[:10], [False, *mask[1:]])
        node.meta["val"] = (None, *node.meta["val"][1:])


def _per_dimension(parameter: Sequence[int], n_dimensions: int) -> list[int]:
    """Repeats a convolution's parameter that is given as one number for all dimensions."""
    return list(parameter) * n_dimensions if len(parameter) == 1 else list(parameter)


def _is_onednn_convolution(x: torch.Tensor) -> bool:
    plain = x.device.type == "cpu" and bool(torch.backends.mkldnn.enabled)
    dense = any(x.is_contiguous(memory_format=layout) for layout in (torch.contiguous_format, torch.channels_last))
    return plain and x.dim() == 4 and x.dtype is torch.float32 and dense


def _is_same_primitive(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Tells whether both forms give the same bits; of groups in channels_last those do that have one channel each."""
    is_depthwise = weight.shape[0] == groups and weight.shape[1] == 1
    return groups == 1 or is_depthwise or x.is_contiguous()


def chunk_batch_norm(joint: JointGraph) -> None:
    """Runs batch norm's backward pass some channels at a time, for the largest inputs.

    It takes up to twice as long, and only the largest ones can hold the peak of the step.
    """
    _chunk_batch_norm(joint, lambda t: t.is_contiguous())


def chunk_batch_norm_by_pixels(joint: JointGraph) -> None:
    """Does the same for images in channels_last, some pixels at a time: sums are taken in another order than ATen's."""
    _chunk_batch_norm(joint, _is_in_channels_last)


def _chunk_batch_norm(joint: JointGraph, fits: Callable[[torch.Tensor], bool]) -> None:
    nodes = [n for n in backward_nodes(joint) if n.target is aten.native_batch_norm_backward.default]
    largest = max((_n_bytes(n.args[1]) for n in nodes), default=0)
    for node in nodes:
        if node.args[7] is not True or _n_bytes(node.args[1]) * LARGE < largest:
            continue
        gradient, x, weight, _, _, mean, invstd, _, eps, mask = node.args
        if not all(t.device.type == "cpu" and t.dim() >= 3 and fits(t) for t in (gradient.meta["val"], x.meta["val"])):
            continue
        with joint.module.graph.inserting_before(node):
            target = torch.ops.fxhybrid.batch_norm_backward.default
            new = call(joint, target, (gradient, x, weight, mean, invstd, eps, mask), Phase.BACKWARD)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        joint.module.graph.erase_node(node)


def _is_in_channels_last(image: torch.Tensor) -> bool:
    is_image = image.dim() == 4 and image.dtype is torch.float32 and not image.is_contiguous()
    return is_image and image.is_contiguous(memory_format=torch.channels_last)


def parameter_gradients_first(joint: JointGraph) -> None:
    """Moves work that ends in a parameter's gradient to where it can first be done.

    A weight gradient reads a saved activation; doing it before the input gradient is made lets the activation
    go first.
    """
    nodes = [n for n in backward_nodes(joint) if n.op == "call_function"]
    leaf: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.users and all(user.op == "output" or user in leaf for user in node.users):
            leaf.add(node)
    waiting = {n: sum(1 for i in n.all_input_nodes if i.op == "call_function" and _is_backward(i)) for n in nodes}
    output = joint.module.graph.output_node()
    done: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            current = stack.pop()
            if current in done:
                continue
            done.add(current)
            output.prepend(current)
            for user in current.users:
                if user in waiting:
                    waiting[user] -= 1
            ready = [u for u in current.users if u not in done and waiting.get(u) == 0]
            eager = [u for u in ready if u in leaf or u.target is operator.getitem]
            stack.extend(sorted(eager, key=order.__getitem__, reverse=True))

    order = {n: i for i, n in enumerate(nodes)}
    for node in nodes:
        place(node)


def _is_backward(node: fx.Node) -> bool:
    return phase_of(node) is Phase.BACKWARD


def _n_bytes(node: fx.Node) -> int:
    """Counts the bytes of a tensor's elements, symbolic where sizes are: ``Tensor.nbytes`` is not."""
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()
