"""The lossless codec for bool tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fxhybrid.codecs.codec import Codec, empty_header, register
from fxhybrid.codecs.kernels.storage import TensorMeta, storage_view


class BitPack(Codec):
    """Packs one bit per bool: spec ``bitpack``.

    The storage is cut into eight equal planes; bit i of byte j is element j of plane i. So every step
    is one pass over contiguous bytes, which is as fast as a copy.
    """

    spec = "bitpack"
    lossless = True

    def supports(self, meta: TensorMeta) -> bool:
        return meta.dtype == torch.bool and meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return -(-meta.numel // 8), 0

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        n_bytes = self.encoded_bytes(meta)[0]
        packed = x.new_empty(n_bytes, dtype=torch.uint8)
        for bit, plane in enumerate(_planes(storage_view(x).view(torch.uint8), n_bytes)):
            if bit == 0:
                packed.copy_(plane)
            else:  # adding a scaled plane needs no temporary, unlike shift and or
                packed[: plane.numel()].add_(plane, alpha=1 << bit)
        return packed, empty_header(x)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        out = qdata.new_empty(meta.numel, dtype=torch.bool)
        for bit, plane in enumerate(_planes(out.view(torch.uint8), qdata.numel())):
            torch.bitwise_right_shift(qdata[: plane.numel()], bit, out=plane)
            plane.bitwise_and_(1)
        return out.as_strided(meta.shape, meta.stride)


def _planes(flat: Tensor, length: int) -> list[Tensor]:
    """Cuts into at most eight parts of this length; the last may be shorter."""
    return list(torch.split(flat, length)) if length else []


def _bitpack(parameters: str) -> Codec:
    if parameters:
        raise ValueError("bitpack takes none")
    return BitPack()


register("bitpack", _bitpack)
