"""The codecs' kernels on CUDA, in Triton: the arithmetic of ``reference.py`` step by step, so the same bytes.

One program packs a block of whole rows: a first pass finds range and non-finite values, a second one packs. Sums of
products are written as ``tl.fma`` and divisions as ``tl.div_rn``, since a compiler's choice there would show in the
codes. Nothing is allocated in addition to what the caller made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxhybrid.codecs.kernels.reference import FLOATS, PARAMETER_BYTES
from fxhybrid.codecs.kernels.storage import storage_view

_BLOCK = 1024  # elements or bytes of a row that one program looks at together
_PROGRAM = 2048  # elements that one program looks at together, over all its rows


@triton.jit
def _place(n_rows, row, row_bytes, n_digits, widths, starts, BITS: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows and which of them exist; width of each, bytes of its codes, and where these begin."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = r < n_rows
    r = tl.minimum(r, n_rows - 1)
    if BITS > 0:
        bits = tl.full([ROWS], BITS, tl.int32)
        m = tl.zeros([ROWS], tl.int32) + row_bytes
        start = r * row_bytes
    else:
        digit = r % n_digits
        bits = tl.load(widths + digit)
        m = (row * bits + 7) // 8
        start = r // n_digits * tl.load(starts + n_digits) + tl.load(starts + digit)
    return r, is_row, bits, m, start


@triton.jit
def _compand(v):
    half = ((v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 1) + 532676608  # half of the bits of 1.0
    mapped = half.to(tl.float32, bitcast=True)
    return tl.where(v < 0, -mapped, mapped)


@triton.jit
def _expand(y):
    half = tl.abs(y).to(tl.int32, bitcast=True) - 532676608
    square = tl.maximum(tl.minimum(half, 1069547519), 0) << 1  # at most the largest float32
    square = square | (y.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(y == y, square.to(tl.float32, bitcast=True), y)


@triton.jit
def _pack_rows(
    x, codes, parameters, widths, starts, n_rows, row, row_bytes, n_digits,
    BITS: tl.constexpr, SQRT: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r, is_row, bits, m, start = _place(n_rows, row, row_bytes, n_digits, widths, starts, BITS, ROWS)
    levels = (1 << bits) - 1

    low = tl.full([ROWS], float("inf"), tl.float32)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    most = tl.zeros([ROWS], tl.int32)  # bits of the largest |x|: NaN and infinities come last
    for j in range(0, row, BLOCK):
        at = j + tl.arange(0, BLOCK)
        inside = (at < row)[None, :] & is_row[:, None]
        v = tl.load(x + r[:, None] * row + at[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(inside, v, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(inside, v, float("-inf")), 1))
        most = tl.maximum(most, tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    finite = most < 0x7F800000
    low = tl.where(finite, low, 0.0)
    high = tl.where(finite, high, 0.0)
    if SQRT:
        low, high = _compand(low), _compand(high)

    one = tl.full([ROWS], 1.0, tl.float32)
    scale = (high * 0.5 - low * 0.5) * tl.div_rn(one + one, levels.to(tl.float32))  # high - low may overflow
    tiny = scale < 1e-30
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(one, tl.where(scale == 0.0, one, scale)))
    shift = -(low * inverse)
    hard = tiny | (tl.abs(shift) > 262144.0)  # no finite inverse, or its product is too coarse
    up = tl.where(tiny, 1152921504606846976.0, 1.0)  # 2^60
    lifted = tl.where(scale == 0.0, one, scale * up)
    factor = tl.where(hard, tl.where(scale == 0.0, 0.0, tl.div_rn(one, lifted)), inverse)
    addend = tl.where(hard, 12582912.0, shift)  # 1.5 * 2^23: after adding it, the low bits are the nearest integer

    for j in range(0, row_bytes, BLOCK):
        byte = j + tl.arange(0, BLOCK)
        joined = tl.zeros([ROWS, BLOCK], tl.int32)
        wanted = (byte[None, :] < m[:, None]) & is_row[:, None]
        for part in tl.static_range(PARTS):
            inside = wanted & (part * bits < 8)[:, None]
            at = part * m[:, None] + byte[None, :]
            if not EVEN:
                at = tl.minimum(at, row - 1)
            v = tl.load(x + r[:, None] * row + at, mask=inside, other=0.0).to(tl.float32)
            if SQRT:
                v = _compand(v)
            v = tl.where(hard[:, None], (v - low[:, None]) * up[:, None], v)
            y = tl.fma(v, factor[:, None] + tl.zeros_like(v), addend[:, None] + tl.zeros_like(v))
            y = tl.where(hard[:, None], y, y + 12582912.0)
            code = y.to(tl.int32, bitcast=True) & levels[:, None]
            joined |= tl.where(inside, code << (part * bits)[:, None], 0)
        joined = tl.where(finite[:, None], joined, 0)
        tl.store(codes + start[:, None] + byte[None, :], joined.to(tl.uint8), mask=wanted)
    tl.store(parameters + 2 * r, tl.where(finite, scale, float("nan")), mask=is_row)
    tl.store(parameters + 2 * r + 1, tl.where(finite, low, float("nan")), mask=is_row)


@triton.jit
def _unpack_rows(
    codes, parameters, x, widths, starts, n_rows, row, row_bytes, n_digits, limit,
    BITS: tl.constexpr, SQRT: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r, is_row, bits, m, start = _place(n_rows, row, row_bytes, n_digits, widths, starts, BITS, ROWS)
    levels = (1 << bits) - 1
    scale, low = tl.load(parameters + 2 * r), tl.load(parameters + 2 * r + 1)
    # near the end of float32 a row is restored at half its size, or the widest range would overflow
    half = tl.where(scale * levels.to(tl.float32) + tl.abs(low) < 1.7e38, 1.0, 0.5)
    factor, addend = scale * half, low * half
    for j in range(0, row_bytes, BLOCK):
        byte = j + tl.arange(0, BLOCK)
        wanted = (byte[None, :] < m[:, None]) & is_row[:, None]
        joined = tl.load(codes + start[:, None] + byte[None, :], mask=wanted, other=0).to(tl.int32)
        for part in tl.static_range(PARTS):
            at = part * m[:, None] + byte[None, :]
            code = ((joined >> (part * bits)[:, None]) & levels[:, None]).to(tl.float32)
            v = tl.fma(code, factor[:, None] + tl.zeros_like(code), addend[:, None] + tl.zeros_like(code))
            v = tl.where(half[:, None] < 1.0, v * 2.0, v)
            if SQRT:
                v = _expand(v)
            v = tl.where(v > limit, limit, v)  # rounding must not make infinities; a NaN stays one
            v = tl.where(v < -limit, -limit, v)
            inside = wanted & (part * bits < 8)[:, None]
            if not EVEN:
                inside = inside & (at < row)
            tl.store(x + r[:, None] * row + at, v.to(x.dtype.element_ty), mask=inside)


class TritonKernels:
    """Runs the Triton kernels on CUDA: a ``protocol.Kernels``."""

    row_dtypes = FLOATS

    def pack_rows(
        self, bits: int, sqrt: bool, rows: Tensor, n_rows: int, row: int, codes: Tensor, parameters: Tensor
    ) -> None:
        """Packs the first ``n_rows`` rows of a storage, ``row`` elements each."""
        pointers = (storage_view(rows), codes, _pairs(parameters, n_rows), codes, codes)
        _launch(_pack_rows, pointers, n_rows, row, (1,), bits, sqrt)

    def unpack_rows(
        self, bits: int, sqrt: bool, codes: Tensor, parameters: Tensor, n_rows: int, row: int, rows: Tensor
    ) -> None:
        """Undoes :meth:`pack_rows`."""
        pointers = (codes, _pairs(parameters, n_rows), storage_view(rows), codes, codes)
        _launch(_unpack_rows, pointers, n_rows, row, (1, torch.finfo(rows.dtype).max), bits, sqrt)

    def pack_channels(
        self, widths: Tensor, starts: Tensor, x: Tensor, row: int, codes: Tensor, parameters: Tensor
    ) -> None:
        """Packs rows whose widths take turns."""
        pairs = parameters.view(torch.float32)
        _launch(_pack_rows, (x, codes, pairs, widths, starts), pairs.numel() // 2, row, (len(widths),))

    def unpack_channels(
        self, widths: Tensor, starts: Tensor, codes: Tensor, parameters: Tensor, row: int, x: Tensor
    ) -> None:
        """Undoes :meth:`pack_channels`."""
        pairs = parameters.view(torch.float32)
        numbers = (len(widths), torch.finfo(x.dtype).max)
        _launch(_unpack_rows, (codes, pairs, x, widths, starts), pairs.numel() // 2, row, numbers)


def _pairs(parameters: Tensor, n_rows: int) -> Tensor:
    """Returns scales and lowest values of rows; what comes after them in a header is not looked at."""
    return parameters.view(-1)[: PARAMETER_BYTES * n_rows].view(torch.float32)


def _launch(
    kernel: Any,
    pointers: tuple[Tensor, ...],
    n_rows: int,
    row: int,
    numbers: tuple[float, ...],
    bits: int = 0,
    sqrt: bool = False,
) -> None:
    """Runs a kernel over all rows; ``bits`` is 0 where each row has its own."""
    row_bytes = -(-row * (bits or 8) // 8)  # of the widest rows
    block = min(triton.next_power_of_2(max(row_bytes, 1)), _BLOCK)
    rows = max(1, min(_PROGRAM // block, triton.next_power_of_2(n_rows)))
    parts = 8 // (bits or 2)
    shape = {"BITS": bits, "SQRT": sqrt, "PARTS": parts, "EVEN": row % parts == 0, "ROWS": rows, "BLOCK": block}
    _run(kernel, triton.cdiv(n_rows, rows) if row else 0, pointers, (n_rows, row, row_bytes, *numbers), shape)


def _run(
    kernel: Any, programs: int, pointers: tuple[Tensor, ...], numbers: tuple[float, ...], shape: dict[str, int]
) -> None:
    """Runs a kernel's programs on the device that holds its tensors."""
    if programs:
        with torch.cuda.device(pointers[0].get_device()):
            kernel[(programs,)](*pointers, *numbers, **shape, enable_fp_fusion=False)
