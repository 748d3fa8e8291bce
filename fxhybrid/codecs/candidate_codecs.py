"""Finds the codecs that are worth considering for a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from fxhybrid.codecs.codec import Codec, get_codec
from fxhybrid.codecs.kernels.storage import TensorMeta

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MIN_ROW = 64  # shorter rows pack several times slower and spend more on scales
_MAX_ROW = 4096  # longer rows gain nothing
_ROW_WITHOUT_DIVISOR = 256
_ROWS = {False: (("rowwise8", 8), ("rowwise4", 4)), True: (("sqrt8", 8), ("sqrt4", 4))}


def candidate_codecs(meta: TensorMeta, *, softmax: bool = False) -> tuple[Codec, ...]:
    """Finds the codecs worth considering for a tensor, the most precise first.

    Args:
        meta: the tensor's meta.
        softmax: whether the tensor's lines are results of softmax, or parts of such.

    Returns:
        Codecs that support the meta and make it smaller; empty if there is none.
    """
    if meta.dtype == torch.bool:
        specs = ["bitpack"]
    elif meta.dtype in _FLOATS and meta.numel >= _MIN_ROW:
        specs = [f"{name}:{row_length(meta, bits, planes=not softmax)}" for name, bits in _ROWS[softmax]]
    else:
        specs = []
    codecs = (get_codec(spec) for spec in specs)
    return tuple(c for c in codecs if c.supports(meta) and sum(c.encoded_bytes(meta)) < meta.nbytes)


def coarsest_lossy(choices: Mapping[int, Iterable[str]], storages: Iterable[int]) -> dict[int, str]:
    """Returns the codec of most noise of each of the storages that is offered a lossy one.

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
    their neighbours; long ones are halved.
    """
    per_byte = 8 // bits
    row = _natural_row(meta, planes)
    while row > _MAX_ROW and row % (2 * per_byte) == 0:
        row //= 2
    if row > _MAX_ROW:
        return _ROW_WITHOUT_DIVISOR
    first = -(-_MIN_ROW // row)
    merged = [row * count for count in range(first, first + per_byte * 8) if row * count % per_byte == 0]
    return next((length for length in merged if meta.numel % length == 0), merged[0])


def _natural_row(meta: TensorMeta, planes: bool) -> int:
    order = meta.storage_order
    plane = math.prod(meta.shape[2:])
    if planes and len(order) > 3 and list(order) == sorted(order) and plane > 1:
        return plane
    return next((meta.shape[dim] for dim in reversed(order) if meta.shape[dim] > 1), 1)
