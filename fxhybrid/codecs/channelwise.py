"""Lossy codec: every channel, or group of neighbouring ones, at a width of its own, 8, 4 or 2 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxhybrid.codecs.codec import Codec, empty_encoded, get_codec, register
from fxhybrid.codecs.kernels import reference
from fxhybrid.codecs.kernels.protocol import kernels_for, kernels_key
from fxhybrid.codecs.kernels.reference import PARAMETER_BYTES
from fxhybrid.codecs.kernels.storage import TensorMeta
from fxhybrid.codecs.widths import STEP_ERROR

_LARGEST_PART = 4096  # elements; the kernels copy a longer row to the stack if it is not of whole bytes
_WIDTHS = (8, 4, 2)
_IN_TURN = "4842"


class Channelwise(Codec):
    """Packs planes of a tensor [N, C, ...] as rows: spec ``channelwise:`` and C digits of 8, 4 or 2.

    With C / k digits, k neighbouring channels form one row: that is for small planes. qdata holds the rows' codes and
    header their parameters, both in the tensor's own order, so that it is read and written from front to back.
    ``widths.py`` says which digits are best.
    """

    lossless = False

    def __init__(self, parameters: str) -> None:
        if not parameters or set(parameters) - set("248"):
            raise ValueError("needs a digit of 2, 4 or 8 for every channel")
        self.spec = f"channelwise:{parameters}"
        self.widths = np.array([int(digit) for digit in parameters], dtype=np.int32)
        # without knowing the channels: as if all were alike, which the widths were not chosen for
        self.noise = 15 * float(np.sqrt(np.mean([STEP_ERROR[width] for width in self.widths])))
        self.kernels_key = kernels_key()

    def profiled_as(self) -> Codec:
        """Returns as many widths in turn: what costs time is reading the tensor, whatever the widths."""
        return get_codec(f"channelwise:{(_IN_TURN * len(self.widths))[: len(self.widths)]}")

    def supports(self, meta: TensorMeta) -> bool:
        if meta.dtype != torch.float32 or len(meta.shape) < 3 or meta.shape[1] % len(self.widths):
            return False
        in_order = all(
            meta.stride[dim] == math.prod(meta.shape[dim + 1 :]) for dim, size in enumerate(meta.shape) if size > 1
        )
        row = self._row(meta)
        return meta.is_dense and (in_order or meta.numel == 0) and (row % 4 == 0 or row <= _LARGEST_PART)

    def _row(self, meta: TensorMeta) -> int:
        """Returns the elements of one sample and digit."""
        return math.prod(meta.shape[1:]) // len(self.widths)

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        row, n_samples = self._row(meta), meta.shape[0]
        n_rows = n_samples * len(self.widths) if row else 0
        return n_samples * int(_offsets(self, row)[-1]), n_rows * PARAMETER_BYTES

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        qdata, header = empty_encoded(self, meta, x.device)
        kernels = kernels_for(x.device)
        if kernels is None:
            for planes, codes, parameters in self._samples(x.detach(), qdata, header):
                for width, channels, places in self._groups(meta, x.device):
                    packed, pair = reference.pack_rows(planes[channels], width, sqrt=False)
                    codes[places] = packed.view(-1)
                    parameters[channels] = pair
            return qdata, header
        row = self._row(meta)
        kernels.pack_channels(*_table(self, row, x.device), x.detach(), row, qdata, header)
        return qdata, header

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        out = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=qdata.device)
        kernels, row = kernels_for(qdata.device), self._row(meta)
        if kernels is None:
            for planes, codes, parameters in self._samples(out, qdata, header):
                for width, channels, places in self._groups(meta, qdata.device):
                    packed = codes[places].view(len(channels), -1)
                    planes[channels] = reference.unpack_rows(packed, parameters[channels], row, width, sqrt=False)
            return out
        kernels.unpack_channels(*_table(self, row, qdata.device), qdata, header, row, out)
        return out

    def _samples(self, x: Tensor, qdata: Tensor, header: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields rows [digits, row], codes and parameters of each sample; nothing for an empty tensor."""
        if x.numel():
            parameters = header.view(torch.float32).view(x.shape[0], -1, 2)
            yield from zip(
                x.view(x.shape[0], len(self.widths), -1), qdata.view(x.shape[0], -1), parameters, strict=True
            )

    def _groups(self, meta: TensorMeta, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields each width, its digits' places, and the places of their codes in a sample's."""
        row = self._row(meta)
        for width in _WIDTHS:
            channels = np.flatnonzero(self.widths == width)
            if len(channels):
                starts = _offsets(self, row)[channels]
                places = (starts[:, None] + np.arange(reference.code_bytes(row, width))).reshape(-1)
                yield width, torch.from_numpy(channels).to(device), torch.from_numpy(places).to(device)


@lru_cache(maxsize=1024)
def _offsets(codec: Channelwise, row: int) -> npt.NDArray[np.int64]:
    """Returns where each digit's codes begin within a sample's, and their end."""
    ends: npt.NDArray[np.int64] = np.cumsum(-(-codec.widths.astype(np.int64) * row // 8))
    return np.concatenate([np.zeros(1, np.int64), ends])


@lru_cache(maxsize=1024)
def _table(codec: Channelwise, row: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Puts widths and offsets where the kernels read them."""
    return torch.from_numpy(codec.widths).to(device), torch.from_numpy(_offsets(codec, row)).to(device)


register("channelwise", Channelwise)
