"""Lossless codecs for bool tensors and for integers of a known range."""

from __future__ import annotations

import torch
from torch import Tensor

from fxhybrid.codecs.codec import Codec, empty_header, register
from fxhybrid.codecs.kernels.storage import TensorMeta, storage_view
from fxhybrid.errors import CodecError

_NARROW_TO = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}


class BitPack(Codec):
    """One bit per bool: spec ``bitpack``.

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
    """At most eight parts of this length; the last may be shorter."""
    return list(torch.split(flat, length)) if length else []


class Narrow(Codec):
    """Integers kept in a smaller type: spec ``narrow:<uint8|int16|int32>``.

    Lossless only for values that fit the smaller type. The caller proves that; nothing is checked here,
    because a check would read the whole tensor.
    """

    lossless = True

    def __init__(self, parameters: str) -> None:
        if parameters not in _NARROW_TO:
            raise CodecError(f"narrow:{parameters} must name one of {', '.join(_NARROW_TO)}")
        self.spec = f"narrow:{parameters}"
        self.dtype = _NARROW_TO[parameters]

    def supports(self, meta: TensorMeta) -> bool:
        integers = (torch.int64, torch.int32)
        return meta.dtype in integers and self.dtype.itemsize < meta.dtype.itemsize and meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return meta.numel * self.dtype.itemsize, 0

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        return storage_view(x).to(self.dtype).view(torch.uint8), empty_header(x)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        return qdata.view(self.dtype).to(meta.dtype).as_strided(meta.shape, meta.stride)


def _bitpack(parameters: str) -> Codec:
    if parameters:
        raise ValueError("bitpack takes none")
    return BitPack()


register("bitpack", _bitpack)
register("narrow", Narrow)
