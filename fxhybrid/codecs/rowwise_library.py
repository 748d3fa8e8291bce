"""Row-wise codecs on the library's kernels, where none can be compiled.

The row kernels keep scale and bias in float16 (at 4 and 2 bits) and drop NaN. So a tensor is first tried
as it is; one cheap sum and a look at the rows' own parameters tell whether that was right. Only if not,
it is moved into the kernels' good range, y = (x - shift) / unit with unit a power of two, and packed
again. A tensor with NaN or Inf decodes to NaN everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxhybrid.codecs.kernels.storage import TensorMeta, storage_view
from fxhybrid.codecs.rowwise import Rowwise, chunk_elements
from fxhybrid.codecs.rowwise_kernels import (
    RowKernels,
    host_row_parameters,
    library_kernels,
    reference_kernels,
    row_bytes,
)

# Rows looked at together: their parameters take 12 bytes each that no allocator of torch's counts.
_LOOK_ROWS = 1 << 14
_FIXED_HEADER_BYTES = 8  # unit and shift, float32 each
# Largest |x| that is packed as it is. At 4 and 2 bits, float16 holds 6e-5 to 65504 in full precision.
# At 8 bits the kernel adds 1e-8 to ranges, which stays under half a step (1/510) down to rows a fiftieth of 2^-12
# (softmax outputs have such small values), and 2^100 keeps code * scale far from overflow.
_GOOD_RANGE = {8: (2.0**-12, 2.0**100), 4: (2.0**-9, 2.0**15), 2: (2.0**-9, 2.0**15)}
_TARGET_EXPONENT = 12  # elsewhere |x| / unit is brought to [2^11, 2^12)
# A tensor this much farther from zero than it is wide loses its detail in a float16 bias.
_OFFSET_LIMIT = 16.0


@dataclass(frozen=True)
class Transform:
    """What is done before packing: y = (x - shift) / unit."""

    unit: float = 1.0
    shift: float = 0.0

    @property
    def is_identity(self) -> bool:
        return self.unit == 1.0 and self.shift == 0.0

    @property
    def is_poison(self) -> bool:
        return math.isnan(self.unit)


_IDENTITY = Transform()
_POISON = Transform(math.nan, math.nan)


class LibraryRowwise(Rowwise):
    """Rows by the kernels of quantized embedding tables, or by plain ATen that makes the same bytes.

    qdata holds the packed rows; header holds unit and shift, then the elements past the last full row as
    they are.

    The error of an element is at most half a step of its row, range / (2^bits - 1) / 2, plus the rounding
    of scale and bias to float16 (at 4 and 2 bits). Known limit: where rows lie around different large
    offsets, each many times its row's range, the float16 bias costs up to offset / 2048.
    """

    def __init__(self, bits: int, row: int) -> None:
        super().__init__(bits, row)
        self.kernels_key = "aten" if library_kernels(bits) is None else "library"

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        rows, tail = divmod(meta.numel, self.row)
        return rows * row_bytes(self.row, self.bits), _FIXED_HEADER_BYTES + tail * meta.dtype.itemsize

    def spare_bytes(self, meta: TensorMeta) -> int:
        return 3 * 4 * min(meta.numel, chunk_elements(meta.numel) + self.row)

    def kernels(self, device: torch.device) -> RowKernels:
        """The library's kernels where they exist, else plain ATen."""
        library = library_kernels(self.bits) if device.type == "cpu" else None
        return library or reference_kernels(self.bits)

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        flat = storage_view(x)
        n_rows = meta.numel // self.row
        body, tail = flat[: n_rows * self.row].view(n_rows, self.row), flat[n_rows * self.row :]
        if n_rows == 0:
            qdata, transform = x.new_empty((0, 0), dtype=torch.uint8), _IDENTITY
        else:
            qdata, transform = self._pack_checked(body)
        header = x.new_empty(self.encoded_bytes(meta)[1], dtype=torch.uint8)
        fixed = torch.tensor([transform.unit, transform.shift], dtype=torch.float32)
        header[:_FIXED_HEADER_BYTES].view(torch.float32).copy_(fixed)
        header[_FIXED_HEADER_BYTES:].view(meta.dtype).copy_(tail)
        return qdata.view(-1), header

    def _pack_checked(self, body: Tensor) -> tuple[Tensor, Transform]:
        packed, checksum = self._pack(body, _IDENTITY)
        if self._is_good(packed, checksum):
            return packed, _IDENTITY
        transform = self._find_transform(body)
        if transform.is_poison:
            return packed.zero_(), transform
        if transform.is_identity:
            return packed, transform
        del packed  # or it would live beside the second one
        return self._pack(body, transform)[0], transform

    def _pack(self, body: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
        """Packed rows, and a sum over the input that is NaN or Inf if any element is."""
        kernels = self.kernels(body.device)
        if kernels.small_workspace and body.dtype == torch.float32 and transform.is_identity:
            return kernels.pack(body), body.sum()
        packed = body.new_empty((body.shape[0], row_bytes(self.row, self.bits)), dtype=torch.uint8)
        checksum = torch.zeros((), device=body.device)
        for source, target in self._chunks(body, packed):
            rows = source.float()
            checksum += rows.sum()
            if not transform.is_identity:
                # unit is a power of two within [2^-126, 2^126], so its inverse is exact
                rows = (rows - transform.shift).mul_(1 / transform.unit)
            target.copy_(kernels.pack(rows))
            del rows  # or it would live beside the next one
        return packed, checksum

    def _is_good(self, packed: Tensor, checksum: Tensor) -> bool:
        """Whether what was packed as it is was finite and in the good range; may err to False only."""
        widest, lows, highs = zip(*(self._extent(part) for part in torch.split(packed, _LOOK_ROWS)), strict=True)
        width, low, high = max(widest), min(lows), max(highs)
        largest = max(abs(low), abs(high), width)
        smallest_good, largest_good = _GOOD_RANGE[self.bits]
        if not math.isfinite(float(checksum) + sum(widest) + sum(lows) + sum(highs)):
            return False
        if not smallest_good <= largest <= largest_good:
            return False
        return self.bits == 8 or largest <= _OFFSET_LIMIT * (high - low + width)

    def _extent(self, packed: Tensor) -> tuple[float, float, float]:
        """Widest range, lowest and highest bias of packed rows."""
        scale, bias = host_row_parameters(packed, self.bits)
        scale[scale == 1] = 0  # scale 1 also stands for "range lost"; such rows count as flat, the exact look decides
        return float(scale.max()) * ((1 << self.bits) - 1), float(bias.min()), float(bias.max())

    def _find_transform(self, body: Tensor) -> Transform:
        """The exact, slower look: reads every element's value."""
        lows, highs = zip(*(torch.aminmax(chunk.float()) for (chunk,) in self._chunks(body)), strict=True)
        low, high = torch.stack([torch.stack(lows).amin(), torch.stack(highs).amax()]).tolist()
        if not math.isfinite(low) or not math.isfinite(high):
            return _POISON
        shift, middle = 0.0, (low + high) / 2
        if self.bits < 8 and abs(middle) > _OFFSET_LIMIT * (high - low):
            shift = float(torch.tensor(middle, dtype=torch.float32))
        largest = max(abs(low - shift), abs(high - shift))
        smallest_good, largest_good = _GOOD_RANGE[self.bits]
        if largest == 0 or smallest_good <= largest <= largest_good:
            return Transform(1.0, shift)
        exponent = math.frexp(largest)[1] - _TARGET_EXPONENT
        return Transform(2.0 ** min(max(exponent, -126), 126), shift)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        transform = Transform(*header[:_FIXED_HEADER_BYTES].view(torch.float32).tolist())
        n_rows = meta.numel // self.row
        kernels = self.kernels(qdata.device)
        packed = qdata.view(n_rows, row_bytes(self.row, self.bits))
        if meta.dtype == torch.float32 and kernels.small_workspace and n_rows * self.row == meta.numel > 0:
            flat = self._restore(kernels.unpack(packed), transform, meta.dtype).view(-1)
            return flat.as_strided(meta.shape, meta.stride)
        flat = qdata.new_empty(meta.numel, dtype=meta.dtype)
        body = flat[: n_rows * self.row].view(n_rows, self.row)
        for source, target in self._chunks(packed, body):
            target.copy_(self._restore(kernels.unpack(source), transform, meta.dtype))
        flat[n_rows * self.row :].copy_(header[_FIXED_HEADER_BYTES:].view(meta.dtype))
        return flat.as_strided(meta.shape, meta.stride)

    @staticmethod
    def _restore(rows: Tensor, transform: Transform, dtype: torch.dtype) -> Tensor:
        """Undoes the transform in place."""
        if transform.is_poison:
            return rows.fill_(math.nan)
        if transform.is_identity:
            return rows
        limit = torch.finfo(dtype).max  # half a step above the largest finite value is not infinite
        return rows.mul_(transform.unit).add_(transform.shift).clamp_(-limit, limit)

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Matching groups of rows, one chunk each; nothing for no rows."""
        if tensors[0].shape[0]:
            length = max(1, chunk_elements(tensors[0].shape[0] * self.row) // self.row)
            yield from zip(*(torch.split(tensor, length) for tensor in tensors), strict=True)


class ReferenceLibraryRowwise(LibraryRowwise):
    """:class:`LibraryRowwise` by plain ATen everywhere: the reference in tests, with the same bytes."""

    def kernels(self, device: torch.device) -> RowKernels:
        return reference_kernels(self.bits)
