"""Lossy codecs that cast each element: to bfloat16, and to fp8 with one scale per block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxhybrid.codecs.codec import Codec, empty_encoded, empty_header, register
from fxhybrid.codecs.kernels import reference
from fxhybrid.codecs.kernels.protocol import kernels_for, kernels_key
from fxhybrid.codecs.kernels.reference import FP8_BLOCK
from fxhybrid.codecs.kernels.storage import TensorMeta, storage_view

_CHUNK_BLOCKS = 16


class BFloat16(Codec):
    """float32 as bfloat16: spec ``bf16``. Relative error of an element: at most 2^-9."""

    spec = "bf16"
    lossless = False
    noise = 0.0155

    def __init__(self) -> None:
        self.kernels_key = kernels_key()

    def supports(self, meta: TensorMeta) -> bool:
        return meta.dtype == torch.float32 and meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return 2 * meta.numel, 0

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        kernels = kernels_for(x.device)
        if kernels is None:
            return storage_view(x).to(torch.bfloat16).view(torch.uint8), empty_header(x)
        qdata = torch.empty(2 * meta.numel, dtype=torch.uint8, device=x.device)
        kernels.pack_bf16(x, qdata)
        return qdata, torch.empty(0, dtype=torch.uint8, device=x.device)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        kernels = kernels_for(qdata.device)
        if kernels is None:
            return qdata.view(torch.bfloat16).float().as_strided(meta.shape, meta.stride)
        out = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=qdata.device)
        kernels.unpack_bf16(qdata, out)
        return out


class Float8(Codec):
    """float32 as e4m3 bytes times a power of two that fits the largest element of each block: spec ``fp8``.

    Relative error of an element: at most 2^-4 down to 2^-14 of its block's largest; below, at most 2^-18 of the
    largest. A block with a NaN or an infinity decodes to NaN.
    """

    spec = "fp8"
    lossless = False
    noise = 0.24  # of values spread over all binades of a block's upper half, normal numbers for one

    def __init__(self) -> None:
        self.kernels_key = kernels_key()

    def supports(self, meta: TensorMeta) -> bool:
        return meta.dtype == torch.float32 and meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return meta.numel, 4 * -(-meta.numel // FP8_BLOCK)

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        qdata, header = empty_encoded(self, meta, x.device)
        kernels = kernels_for(x.device)
        if kernels is not None:
            kernels.pack_fp8(x, qdata, header)
            return qdata, header
        for source, target, units in _blocks(storage_view(x), qdata, header):
            codes, found = reference.pack_e4m3(source)
            target.copy_(codes)
            units.copy_(found)
        return qdata, header

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        out = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=qdata.device)
        kernels = kernels_for(qdata.device)
        if kernels is not None:
            kernels.unpack_fp8(qdata, header, out)
            return out
        for target, source, units in _blocks(storage_view(out), qdata, header):
            target.copy_(reference.unpack_e4m3(source, units))
        return out


def _blocks(elements: Tensor, codes: Tensor, header: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Matching rows of whole blocks, few at a time so that copies stay small, and at last the rest as one block."""
    units, n_blocks = header.view(torch.float32), elements.numel() // FP8_BLOCK
    whole = n_blocks * FP8_BLOCK
    if n_blocks:
        rows = (elements[:whole].view(-1, FP8_BLOCK), codes[:whole].view(-1, FP8_BLOCK), units[:n_blocks])
        yield from zip(*(torch.split(part, _CHUNK_BLOCKS) for part in rows), strict=True)
    if whole < elements.numel():
        yield elements[whole:].view(1, -1), codes[whole:].view(1, -1), units[n_blocks:]


def _plain(codec: type[Codec]) -> None:
    def make(parameters: str) -> Codec:
        if parameters:
            raise ValueError("takes none")
        return codec()

    register(codec.spec, make)


_plain(BFloat16)
_plain(Float8)
