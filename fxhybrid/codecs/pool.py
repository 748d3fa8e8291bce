"""Lossless codec for the indices of a max pool: 8 bytes become 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxhybrid.codecs.codec import Codec, empty_header, parse_integers, register
from fxhybrid.codecs.kernels.storage import TensorMeta

_PARAMETERS = "kh,kw,sh,sw,ph,pw,dh,dw,H,W"
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class PoolWindow:
    """Holds the geometry of a 2-d max pool.

    Attributes:
        kernel: rows and columns of the window.
        stride: steps from window to window.
        padding: rows and columns added before the first.
        dilation: steps between the elements of a window.
        plane: H and W of the pooled input.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    plane: tuple[int, int]

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride, *self.dilation, *self.plane) < 1 or min(self.padding) < 0:
            raise ValueError(f"sizes must be positive, padding not negative: {self}")
        if self.kernel[0] * self.kernel[1] > 256:
            raise ValueError(f"a window of {self.kernel} has more than 256 places")

    def starts(self, oh: int, ow: int, device: torch.device) -> Tensor:
        """Returns the plane index of each window's first element, int64 [oh, ow]; outside the plane where padded."""
        rows = torch.arange(oh, device=device) * self.stride[0] - self.padding[0]
        columns = torch.arange(ow, device=device) * self.stride[1] - self.padding[1]
        return rows[:, None] * self.plane[1] + columns

    def steps(self, device: torch.device) -> Tensor:
        """Returns the plane index of each place in a window less that of the first, int64 [kh * kw]."""
        rows = torch.arange(self.kernel[0], device=device) * self.dilation[0]
        columns = torch.arange(self.kernel[1], device=device) * self.dilation[1]
        return (rows[:, None] * self.plane[1] + columns).reshape(-1)


class PoolIndices(Codec):
    """Packs indices of ``max_pool2d_with_indices`` as places in the window: spec ``pool:kh,...,H,W``.

    Index and place tell the same: index = start of the window + step of the place. Two places may have
    the same step (a dilated window wider than the plane); then both decode to the same index. Only
    indices from such a pool may be encoded (ceil_mode too); nothing is checked.
    """

    lossless = True

    def __init__(self, parameters: str) -> None:
        values = parse_integers(parameters, _PARAMETERS)
        pairs = [(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        self.window = PoolWindow(*pairs)
        self.spec = "pool:" + ",".join(map(str, values))

    def supports(self, meta: TensorMeta) -> bool:
        return meta.dtype == torch.int64 and len(meta.shape) >= 2 and meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return meta.numel, 0

    def example(self, meta: TensorMeta, device: torch.device) -> Tensor | None:
        first_places = torch.zeros(meta.numel, dtype=torch.uint8, device=device)
        return self._decode(first_places, empty_header(first_places), meta)

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        steps = self.window.steps(x.device)
        place_of = torch.zeros(self._last_step + 1, dtype=torch.uint8, device=x.device)
        place_of[steps] = torch.arange(steps.numel(), device=x.device).to(torch.uint8)
        qdata = x.new_empty(meta.numel, dtype=torch.uint8)
        for indices, places, starts in self._chunks(x.detach(), qdata, meta):
            torch.take(place_of, indices - starts, out=places)
        return qdata, empty_header(x)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        steps = self.window.steps(qdata.device)
        out = torch.empty_strided(meta.shape, meta.stride, dtype=torch.int64, device=qdata.device)
        for indices, places, starts in self._chunks(out, qdata, meta):
            step = steps.index_select(0, places.reshape(-1).int()).view(indices.shape)
            torch.add(step, starts, out=indices)
        return out

    @property
    def _last_step(self) -> int:
        (kh, kw), (dh, dw) = self.window.kernel, self.window.dilation
        return (kh - 1) * dh * self.window.plane[1] + (kw - 1) * dw

    def _chunks(self, indices: Tensor, places: Tensor, meta: TensorMeta) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields matching parts of indices, places and window starts, all in storage order."""
        if meta.numel == 0:
            return
        order = meta.storage_order
        indices = indices.permute(order)
        places = places.view(indices.shape)
        oh, ow = meta.shape[-2:]
        starts = self.window.starts(oh, ow, indices.device).expand(meta.shape).permute(order)
        dim = next((dim for dim, size in enumerate(indices.shape) if size > 1), 0)
        length = max(1, _CHUNK_ELEMENTS * indices.shape[dim] // meta.numel)
        parts = (torch.split(tensor, length, dim) for tensor in (indices, places, starts))
        yield from zip(*parts, strict=True)


register("pool", PoolIndices)
