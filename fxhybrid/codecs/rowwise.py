"""Row-wise codecs: rows of floats as 8 or 4 bits each, with a scale and a lowest value per row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fxhybrid.codecs.codec import Codec, empty_encoded, parse_integers, register
from fxhybrid.codecs.kernels import reference
from fxhybrid.codecs.kernels.protocol import Kernels, kernels_for, kernels_key
from fxhybrid.codecs.kernels.reference import FLOATS, PARAMETER_BYTES
from fxhybrid.codecs.kernels.storage import TensorMeta, storage_view
from fxhybrid.errors import CodecError

# Elements worked on at a time where a float32 copy is needed: little next to the tensor, at most 256 KiB.
_CHUNK_ELEMENTS = (1 << 12, 1 << 16)
_CHUNKS = 32


class Rowwise(Codec):
    """Quantizes rows of R elements, taken in storage order: specs ``rowwise8:R``, ``sqrt8:R``, and so for 4.

    qdata holds the rows' codes; header holds their parameters, then the elements past the last full row as
    they are. The error of an element is at most half a step of its row, range / (2^bits - 1) / 2. Scales are float32:
    every finite row keeps its usual error, whatever its range and offset. A row with a NaN or an infinity decodes to
    NaN, so that loss scaling still notices it.

    ``sqrt`` stands for square-root companding (:func:`reference.compand`). Then the error is at most about half a step
    of the companded row times 2 sqrt(2 |x|): where a row of n sums to 1, like those of softmax, the sum of squared
    errors is about step^2 / 3 however uneven the row is, and for a row that has one large element 4 / n of what it is
    without companding.
    """

    lossless = False

    def __init__(self, bits: int, row: int, sqrt: bool = False) -> None:
        self.spec = f"{'sqrt' if sqrt else 'rowwise'}{bits}:{row}"
        if row < 1 or row * bits % 8:
            raise CodecError(f"{self.spec} needs a positive row length divisible by {8 // bits}")
        self.bits = bits
        self.row = row
        self.sqrt = sqrt
        self.noise = 15 / ((1 << bits) - 1)
        self.kernels_key = kernels_key()

    def supports(self, meta: TensorMeta) -> bool:
        return meta.dtype in FLOATS and meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        rows, tail = divmod(meta.numel, self.row)
        return rows * reference.code_bytes(self.row, self.bits), rows * PARAMETER_BYTES + tail * meta.dtype.itemsize

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        qdata, header = empty_encoded(self, meta, x.device)
        n_rows, kernels = meta.numel // self.row, kernels_for(x.device)
        if kernels is not None and meta.dtype in kernels.row_dtypes:
            self._pack(kernels, x, n_rows, qdata, header)
        else:
            for source, codes, parameters in self._chunks(storage_view(x), qdata, header):
                self._pack(kernels, source.float(), source.shape[0], codes, parameters)
        if n_rows * self.row < meta.numel:
            tail = storage_view(x)[n_rows * self.row :]
            header[n_rows * PARAMETER_BYTES :].view(meta.dtype).copy_(tail)
        return qdata, header

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        out = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=qdata.device)
        n_rows, kernels = meta.numel // self.row, kernels_for(qdata.device)
        if kernels is not None and meta.dtype in kernels.row_dtypes:
            self._unpack(kernels, qdata, header, n_rows, out)
        else:
            limit = torch.finfo(meta.dtype).max
            for target, codes, parameters in self._chunks(storage_view(out), qdata, header):
                rows = torch.empty(target.shape, device=qdata.device)
                self._unpack(kernels, codes, parameters, target.shape[0], rows)
                target.copy_(rows.clamp_(-limit, limit))  # rounding must not make infinities
                del rows  # or it would live as long as the next one
        if n_rows * self.row < meta.numel:
            storage_view(out)[n_rows * self.row :].copy_(header[n_rows * PARAMETER_BYTES :].view(meta.dtype))
        return out

    def _pack(self, kernels: Kernels | None, rows: Tensor, n_rows: int, codes: Tensor, parameters: Tensor) -> None:
        """Packs the first ``n_rows`` rows of a storage."""
        if kernels is None:
            packed = reference.pack_rows(rows, self.bits, self.sqrt)
            codes.copy_(packed[0])
            parameters.copy_(packed[1])
            return
        kernels.pack_rows(self.bits, self.sqrt, rows, n_rows, self.row, codes, parameters)

    def _unpack(self, kernels: Kernels | None, codes: Tensor, parameters: Tensor, n_rows: int, rows: Tensor) -> None:
        """Undoes :meth:`_pack`, into ``rows``."""
        if kernels is None:
            rows.copy_(reference.unpack_rows(codes, parameters, self.row, self.bits, self.sqrt))
            return
        kernels.unpack_rows(self.bits, self.sqrt, codes, parameters, n_rows, self.row, rows)

    def _chunks(self, flat: Tensor, qdata: Tensor, header: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields matching rows, codes and parameters, a chunk each; nothing for no rows."""
        n_rows = flat.numel() // self.row
        if n_rows == 0:
            return
        rows = flat[: n_rows * self.row].view(n_rows, self.row)
        codes = qdata.view(n_rows, -1)
        parameters = header[: n_rows * PARAMETER_BYTES].view(torch.float32).view(n_rows, 2)
        smallest, largest = _CHUNK_ELEMENTS
        length = max(1, min(max(flat.numel() // _CHUNKS, smallest), largest) // self.row)
        yield from zip(*(torch.split(tensor, length) for tensor in (rows, codes, parameters)), strict=True)


def _make(bits: int, sqrt: bool, parameters: str) -> Rowwise:
    (row,) = parse_integers(parameters, "R")
    return Rowwise(bits, row, sqrt)


for _bits in (8, 4):
    register(f"rowwise{_bits}", partial(_make, _bits, False))
    register(f"sqrt{_bits}", partial(_make, _bits, True))
