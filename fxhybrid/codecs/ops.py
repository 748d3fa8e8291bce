"""The graph's view of codecs: ``fxhybrid::compress`` and ``fxhybrid::decompress``.

Defined with the low-level library interface, because the decorator's checks cost tens of microseconds a
call. Neither op has a gradient: they stand between a forward and a backward graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxhybrid.codecs.codec import get_codec
from fxhybrid.codecs.kernels.storage import TensorMeta

# kept for the life of the process: the operators go when it goes
_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("compress(Tensor x, str codec) -> (Tensor qdata, Tensor header)", tags=_TAGS)
_LIBRARY.define(
    "decompress(Tensor qdata, Tensor header, str codec, int[] size, int[] stride, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)


def _compress(x: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    return get_codec(codec).encode(x)


def _decompress(
    qdata: Tensor, header: Tensor, codec: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return get_codec(codec).decode(qdata, header, TensorMeta(tuple(size), tuple(stride), dtype))


def _fake_compress(x: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    encoder, meta = get_codec(codec), TensorMeta.of(x)
    encoder.check_supports(meta)
    qdata_bytes, header_bytes = encoder.encoded_bytes(meta)
    return x.new_empty(qdata_bytes, dtype=torch.uint8), x.new_empty(header_bytes, dtype=torch.uint8)


def _fake_decompress(
    qdata: Tensor, header: Tensor, codec: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    meta = TensorMeta(tuple(size), tuple(stride), dtype)
    get_codec(codec).check_supports(meta)
    return torch.empty_strided(meta.shape, meta.stride, dtype=dtype, device=qdata.device)


_LIBRARY.impl("compress", _compress, "CompositeExplicitAutograd")
_LIBRARY.impl("decompress", _decompress, "CompositeExplicitAutograd")
torch.library.register_fake("fxhybrid::compress", _fake_compress, lib=_LIBRARY)
torch.library.register_fake("fxhybrid::decompress", _fake_decompress, lib=_LIBRARY)
