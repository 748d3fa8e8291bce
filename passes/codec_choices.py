"""Decides which codecs a storage may be offered, by what reads it in the backward pass."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import torch
from torch import fx

import fxhybrid.ops.batch_norm  # noqa: F401  (registers batch_norm_backward)
from fxhybrid.capture.joint_graph import Phase, phase_of
from fxhybrid.codecs import TensorMeta, candidate_codecs, get_codec
from fxhybrid.passes.build_problem import CodecChoices
from fxhybrid.passes.storages import Layout

aten = torch.ops.aten

# Arguments of backward operators that feel small errors only in proportion. Everything else, predicates and
# indices above all, is read exactly.
TOLERANT: dict[object, frozenset[int]] = {
    aten.convolution_backward.default: frozenset([1]),
    aten.native_batch_norm_backward.default: frozenset([1]),
    torch.ops.fxhybrid.batch_norm_backward.default: frozenset([1]),
    aten.native_layer_norm_backward.default: frozenset([1]),
    aten.native_group_norm_backward.default: frozenset([1]),
    aten._fused_rms_norm_backward.default: frozenset([1]),
    aten.gelu_backward.default: frozenset([1]),
    aten.silu_backward.default: frozenset([1]),
    aten.elu_backward.default: frozenset([6]),
    aten.tanh_backward.default: frozenset([1]),
    aten.sigmoid_backward.default: frozenset([1]),
    aten._softmax_backward_data.default: frozenset([1]),
    aten._log_softmax_backward_data.default: frozenset([1]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: frozenset([1, 2, 3, 4]),
    aten.mm.default: frozenset([0, 1]),
    aten.bmm.default: frozenset([0, 1]),
    aten.addmm.default: frozenset([1, 2]),
    aten.baddbmm.default: frozenset([1, 2]),
    aten.mul.Tensor: frozenset([0, 1]),
}
# Layers whose parameters' gradients are a product of the input and what comes from behind.
LAYERS = frozenset(
    [
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.convolution_backward.default,
    ]
)
# They take the part along their input out of a gradient, line by line: where that is most of it, an error of the input
# is felt out of proportion.
LINE_NORMS = frozenset([aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default])
SMALLEST_BYTES = 4096


def codec_choices(layout: Layout, *, lossy: bool, lossless: bool) -> CodecChoices:
    """Returns the codecs offered per storage; storages of a few KiB are not worth a call."""
    choices = {}
    forward = {s for op in layout.forward for s in op.outputs}
    readers = _backward_readers(layout)
    drifting = _drifting(layout)
    for index, storage in enumerate(layout.storages):
        base = storage.base
        if index not in forward or base is None or storage.size_bytes < SMALLEST_BYTES:
            continue
        meta = TensorMeta.of(base.meta["val"])
        if meta.nbytes != storage.size_bytes:
            continue
        codecs = candidate_codecs(meta, softmax=_holds_softmax(base))
        offered = [*_pool_offsets(base), *(c.spec for c in codecs)]
        tolerant = all(_tolerates(reader, argument) for reader, argument in readers.get(index, []))
        tolerant = tolerant and bool(readers.get(index))
        kept = [s for s in offered if (lossless if get_codec(s).lossless else lossy and tolerant)]
        kept = [s for s in kept if index not in drifting or get_codec(s).noise < 1]
        kept = [s for s in kept if sum(get_codec(s).encoded_bytes(meta)) < storage.size_bytes]
        if kept:
            choices[index] = tuple(kept)
    return choices


def _backward_readers(layout: Layout) -> dict[int, list[tuple[fx.Node, int]]]:
    """Finds, for each storage, the backward ops that read it (through views) and at which argument."""
    readers: dict[int, list[tuple[fx.Node, int]]] = {}
    for op in layout.backward:
        for position, argument in enumerate((*op.node.args, *op.node.kwargs.values())):
            nodes: list[fx.Node] = []
            fx.node.map_arg(argument, nodes.append)
            for node in nodes:
                for storage in layout.storages_of.get(node, ()):
                    readers.setdefault(storage, []).append((op.node, position))
    return readers


def _drifting(layout: Layout) -> frozenset[int]:
    """Finds the storages whose error at 4 bits one batch at the start of training does not tell (docs/adr/0014).

    These are inputs of norms over lines, and of the output layer: what reads the forward pass first on the way back.
    """
    made = {s for op in layout.forward for s in op.outputs}
    layers = (op for op in layout.backward if op.node.target in LAYERS and made.intersection(op.inputs))
    norms = (op for op in layout.backward if op.node.target in LINE_NORMS)
    return frozenset(s for op in (*itertools.islice(layers, 1), *norms) for s in op.inputs)


def _tolerates(reader: fx.Node, argument: int) -> bool:
    return phase_of(reader) is Phase.BACKWARD and argument in TOLERANT.get(reader.target, ())


def _holds_softmax(base: fx.Node) -> bool:
    """Tells whether a tensor is made by softmax, or by dropout of that, in any precision.

    Its lines sum to one each: one that attends to few places has values many times those of another, and on a grid
    that both share the small ones become 0. Within a line, too, most are small.
    """
    while base.target in (operator.getitem, aten.native_dropout.default, aten._to_copy.default):
        source = base.args[0]
        assert isinstance(source, fx.Node)
        base = source
    return base.target in (aten._softmax.default, aten._safe_softmax.default)


def _pool_offsets(base: fx.Node) -> Iterator[str]:
    """Yields the window-offset codec for the indices of a max pool."""
    if base.target is not operator.getitem or base.args[1] != 1:
        return
    pool = base.args[0]
    assert isinstance(pool, fx.Node)
    if pool.target is not aten.max_pool2d_with_indices.default:
        return
    x, kernel = pool.args[0], _pair(pool.args[1])
    assert isinstance(x, fx.Node)
    given = [*pool.args[2:], *[None] * 3][:3]
    stride = _pair(given[0]) if given[0] else kernel
    padding, dilation = _pair(given[1] or 0), _pair(given[2] or 1)
    height, width = x.meta["val"].shape[-2:]
    numbers = (*kernel, *stride, *padding, *dilation, height, width)
    if kernel[0] * kernel[1] <= 256:
        yield f"pool:{','.join(str(int(n)) for n in numbers)}"


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    assert isinstance(value, int)
    return (value, value)
