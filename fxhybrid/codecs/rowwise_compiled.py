"""Row-wise codecs on compiled kernels, and which of the two formats a process uses.

A row with a NaN or an infinity decodes to NaN, so that loss scaling still notices it. Scales are float32: every
finite row keeps its usual error, whatever its range and offset. Without a compiler the library's kernels serve
(``rowwise_library.py``), which are much faster than these formulas in plain ATen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fxhybrid.codecs.codec import empty_encoded, parse_integers, register
from fxhybrid.codecs.kernels import reference
from fxhybrid.codecs.kernels.cpu import native_kernels
from fxhybrid.codecs.kernels.protocol import Kernels, kernels_for, kernels_key
from fxhybrid.codecs.kernels.reference import PARAMETER_BYTES
from fxhybrid.codecs.kernels.storage import TensorMeta, storage_view
from fxhybrid.codecs.rowwise import Rowwise, chunk_elements
from fxhybrid.codecs.rowwise_library import LibraryRowwise


class CompiledRowwise(Rowwise):
    """Rows by compiled kernels, and by plain ATen that makes the same bytes where there are none.

    qdata holds the rows' codes; header holds their parameters, then the elements past the last full row as
    they are. The error of an element is at most half a step of its row, range / (2^bits - 1) / 2.

    With ``root``, it is at most about half a step of the roots times 2 sqrt(2 |x|) (``reference.rooted``): where a row
    of n sums to 1, like those of softmax, the sum of squared errors is about step^2 / 3 however uneven the row is, and
    for a row that has one large element 4 / n of what it is without roots.
    """

    def __init__(self, bits: int, row: int, root: bool = False) -> None:
        super().__init__(bits, row, root)
        self.kernels_key = kernels_key()

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        rows, tail = divmod(meta.numel, self.row)
        return rows * reference.code_bytes(self.row, self.bits), rows * PARAMETER_BYTES + tail * meta.dtype.itemsize

    def kernels(self, device: torch.device) -> Kernels | None:
        """The compiled kernels; None stands for plain ATen."""
        return kernels_for(device)

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        qdata, header = empty_encoded(self, meta, x.device)
        n_rows, kernels = meta.numel // self.row, self.kernels(x.device)
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
        n_rows, kernels = meta.numel // self.row, self.kernels(qdata.device)
        if kernels is not None and meta.dtype in kernels.row_dtypes:
            self._unpack(kernels, qdata, header, n_rows, out)
        else:
            limit = torch.finfo(meta.dtype).max
            for target, codes, parameters in self._chunks(storage_view(out), qdata, header):
                rows = torch.empty(target.shape, device=qdata.device)
                self._unpack(kernels, codes, parameters, target.shape[0], rows)
                target.copy_(rows.clamp_(-limit, limit))  # rounding must not make infinities
                del rows  # or it would live beside the next one
        if n_rows * self.row < meta.numel:
            storage_view(out)[n_rows * self.row :].copy_(header[n_rows * PARAMETER_BYTES :].view(meta.dtype))
        return out

    def _pack(self, kernels: Kernels | None, rows: Tensor, n_rows: int, codes: Tensor, parameters: Tensor) -> None:
        """Packs the first ``n_rows`` rows of a storage."""
        if kernels is None:
            packed = reference.pack_rows(rows, self.bits, self.root)
            codes.copy_(packed[0])
            parameters.copy_(packed[1])
            return
        kernels.pack_rows(self.bits, self.root, rows, n_rows, self.row, codes, parameters)

    def _unpack(self, kernels: Kernels | None, codes: Tensor, parameters: Tensor, n_rows: int, rows: Tensor) -> None:
        """Undoes :meth:`_pack`, into ``rows``."""
        if kernels is None:
            rows.copy_(reference.unpack_rows(codes, parameters, self.row, self.bits, self.root))
            return
        kernels.unpack_rows(self.bits, self.root, codes, parameters, n_rows, self.row, rows)

    def _chunks(self, flat: Tensor, qdata: Tensor, header: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Matching rows, codes and parameters, a chunk each; nothing for no rows."""
        n_rows = flat.numel() // self.row
        if n_rows == 0:
            return
        rows = flat[: n_rows * self.row].view(n_rows, self.row)
        codes = qdata.view(n_rows, -1)
        parameters = header[: n_rows * PARAMETER_BYTES].view(torch.float32).view(n_rows, 2)
        length = max(1, chunk_elements(flat.numel()) // self.row)
        yield from zip(*(torch.split(tensor, length) for tensor in (rows, codes, parameters)), strict=True)


class ReferenceRowwise(CompiledRowwise):
    """:class:`CompiledRowwise` by plain ATen everywhere: the reference in tests, with the same bytes."""

    def kernels(self, device: torch.device) -> Kernels | None:
        return None


def make_rowwise(bits: int, row: int) -> Rowwise:
    """The codec of these bits and this row in the format of this process."""
    return LibraryRowwise(bits, row) if native_kernels() is None else CompiledRowwise(bits, row)


def make_root(bits: int, row: int) -> Rowwise:
    """The same with roots: without a compiler by plain ATen, as the library has none."""
    return CompiledRowwise(bits, row, root=True)


def _register(name: str, make: Callable[[int, int], Rowwise], bits: int) -> None:
    register(f"{name}{bits}", lambda parameters: make(bits, *parse_integers(parameters, "R")))


for _bits in (8, 4, 2):
    _register("rowwise", make_rowwise, _bits)
for _bits in (8, 4):
    _register("root", make_root, _bits)
