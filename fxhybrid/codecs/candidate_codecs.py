"""Finds the codecs that are worth considering for a tensor: every codec is offered here, or by no one.

The rules of what the step does with the tensor are in ``passes/codec_choices.py``; calibration adds channel-wise codecs
where a 4-bit one is offered (``accuracy/channel_widths.py``), since their widths follow from measured errors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import fx

from fxhybrid.codecs.codec import Codec, get_codec
from fxhybrid.codecs.kernels.storage import TensorMeta

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MIN_ROW = 64  # shorter rows pack several times slower and spend more on scales
_MIN_MIXED_ROW = 256  # of all channels of some pixels: ranges differ by channel more than from pixel to pixel
_MAX_ROW = 4096  # longer rows gain nothing
_ROW_WITHOUT_DIVISOR = 256
_ROWS = {False: (("rowwise8", 8), ("rowwise4", 4)), True: (("sqrt8", 8), ("sqrt4", 4))}


def candidate_codecs(meta: TensorMeta, made_by: fx.Node | None = None) -> tuple[Codec, ...]:
    """Finds the codecs worth considering for a tensor, the most precise first.

    Args:
        meta: the tensor's meta.
        made_by: the node whose value the tensor is, where codecs may rely on what that says of its values.

    Returns:
        Codecs that support the meta and make it smaller; empty if there is none.
    """
    codecs = sorted((get_codec(spec) for spec in _specs(meta, made_by)), key=lambda codec: codec.noise)
    return tuple(c for c in codecs if c.supports(meta) and sum(c.encoded_bytes(meta)) < meta.nbytes)


def _specs(meta: TensorMeta, made_by: fx.Node | None) -> Iterator[str]:
    if made_by is not None:
        yield from _pool_offsets(made_by)
    if meta.dtype == torch.bool:
        yield "bitpack"
    elif meta.dtype in _FLOATS and meta.numel >= _MIN_ROW:
        softmax = made_by is not None and _holds_softmax(made_by)
        for name, bits in _ROWS[softmax]:
            yield f"{name}:{row_length(meta, bits, planes=not softmax)}"


def coarsest_lossy(choices: Mapping[int, Iterable[str]], storages: Iterable[int]) -> dict[int, str]:
    """Returns the codec of most noise of each of the storages that is offered a lossy one.

    Calibration runs these first, and predicts the errors of all other codecs of a tensor from that.

    Args:
        choices: specs offered to each storage.
        storages: keys of ``choices``.
    """
    lossy = {t: [codec for codec in map(get_codec, choices[t]) if not codec.lossless] for t in storages}
    return {t: max(codecs, key=lambda codec: codec.noise).spec for t, codecs in lossy.items() if codecs}


def row_length(meta: TensorMeta, bits: int, *, planes: bool = True) -> int:
    """Returns the elements per row for a dense float tensor.

    A row is a natural channel: the plane of one sample and channel where the layout is N, C, ... (unless ``planes``
    is False), and else the innermost dimension in storage. Planes too short, or not of whole bytes, are merged with
    their neighbours; long ones are halved. In channels_last a row is all channels of a few
    pixels, or some of those of one.
    """
    per_byte = 8 // bits
    row = _natural_row(meta, planes)
    mixed = planes and _is_channels_last(meta)
    shortest, longest = (_MIN_MIXED_ROW, 2 * _MIN_MIXED_ROW) if mixed else (_MIN_ROW, _MAX_ROW)
    while row > longest and row % (2 * per_byte) == 0:
        row //= 2
    if row > _MAX_ROW:
        return _ROW_WITHOUT_DIVISOR
    first = -(-shortest // row)
    merged = [row * count for count in range(first, first + per_byte * 8) if row * count % per_byte == 0]
    return next((length for length in merged if meta.numel % length == 0), merged[0])


def _natural_row(meta: TensorMeta, planes: bool) -> int:
    order = meta.storage_order
    plane = math.prod(meta.shape[2:])
    if planes and len(order) > 3 and list(order) == sorted(order) and plane > 1:
        return plane
    return next((meta.shape[dim] for dim in reversed(order) if meta.shape[dim] > 1), 1)


def _is_channels_last(meta: TensorMeta) -> bool:
    return len(meta.shape) == 4 and meta.storage_order == (0, 2, 3, 1) and math.prod(meta.shape[2:]) > 1


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
