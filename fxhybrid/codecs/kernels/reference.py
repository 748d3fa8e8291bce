"""The kernels' format in plain ATen, on any device: what runs without a compiler, and the reference in tests.

A row of R elements becomes (8 / bits) equal parts of m bytes, m = ceil(R * bits / 8): code p * m + j stands in
byte j, at bit p * bits; codes past R repeat the last element. An element decodes to code * scale + low, with one
float32 pair (scale, low) per row; the pair is NaN where the row holds a NaN or an infinity.

With square-root companding, all that is said of elements there is of their companded values.

``torch.addcmul`` rounds once where torch uses the processor's fused multiply-add (as on x86 with AVX2); then the bytes
are those of the compiled kernels. Elsewhere a code next to a tie may be its neighbour.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PARAMETER_BYTES = 8  # of one row: scale and lowest value, float32 each
_MAGNITUDE, _LARGEST = 0x7FFFFFFF, 0x7F7FFFFF  # all bits but the sign; those of the largest finite float32
_ONE = 127 << 22  # half of the bits of 1.0
_ROUND = 12582912.0  # 1.5 * 2^23: after adding it, the low bits are the nearest integer


def code_bytes(row: int, bits: int) -> int:
    """Returns the bytes of one row's codes."""
    return -(-row * bits // 8)


def compand(x: Tensor) -> Tensor:
    """Maps float32 values to square roots of their magnitudes, signs kept: straight lines between powers of two.

    The exponent is halved. Zeros of either sign become 1.5 * 2^-64, whose square is taken for 0.
    """
    mapped = (((x.view(torch.int32) & _MAGNITUDE) >> 1) + _ONE).view(torch.float32)
    return torch.where(x.isfinite(), torch.where(x < 0, -mapped, mapped), x)


def expand(y: Tensor) -> Tensor:
    """Undoes :func:`compand`, to the last bit."""
    half = y.abs().view(torch.int32) - _ONE
    square = (half.clamp_(0, _LARGEST >> 1) << 1).view(torch.float32)
    return torch.where(y.isfinite(), square.copysign(y), y)


def pack_rows(rows: Tensor, bits: int, sqrt: bool) -> tuple[Tensor, Tensor]:
    """Packs float32 rows [n, R], companded where ``sqrt`` is set: uint8 codes [n, m], float32 parameters [n, 2]."""
    rows = compand(rows) if sqrt else rows
    parts, levels = 8 // bits, (1 << bits) - 1
    padding = code_bytes(rows.shape[1], bits) * parts - rows.shape[1]
    if padding:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, padding)], 1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)  # aminmax takes three times as long
    scale = (high * 0.5 - low * 0.5) * (2 / levels)  # high - low may overflow
    tiny = scale < 1e-30
    up = torch.where(tiny, 2.0**60, 1.0)
    inverse = (1 / (scale * up)).masked_fill_(scale == 0, 0.0)
    shift = -(low * inverse)
    hard = tiny | (shift.abs() > 2.0**18)  # the scale has no finite inverse, or its product with low is too coarse
    # the same steps for every row: with a branch, the memory that this takes would depend on the data
    y = (rows - low * hard).mul_(up)
    torch.addcmul(torch.where(hard, _ROUND, shift), y, inverse, out=y)
    y += torch.where(hard, 0.0, _ROUND)
    finite = low * 0 == high * 0
    codes = y.view(torch.int32).to(torch.uint8).bitwise_and_(levels).mul_(finite).view(len(rows), parts, -1)
    joined = codes[:, 0]
    for part in range(1, parts):
        joined = joined | (codes[:, part] << (bits * part))
    return joined, torch.cat([scale, low], 1).masked_fill_(~finite, math.nan)


def unpack_rows(codes: Tensor, parameters: Tensor, row: int, bits: int, sqrt: bool) -> Tensor:
    """Restores what :func:`pack_rows` made of rows of ``row`` elements, as float32 [n, row]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    split = (codes[:, None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    rows = split.reshape(codes.shape[0], -1)[:, :row].float()
    scale, low = parameters[:, :1], parameters[:, 1:]
    # near the end of float32 a row is restored at half its size, or the widest range would overflow
    half = torch.where(scale * ((1 << bits) - 1) + low.abs() < 1.7e38, 1.0, 0.5)
    torch.addcmul(low * half, rows, scale * half, out=rows)
    limit = torch.finfo(torch.float32).max
    rows.mul_(1 / half).clamp_(-limit, limit)
    return expand(rows) if sqrt else rows


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
