"""The kernels' formats in plain ATen, on any device: the fallback without a compiler, and the reference in tests.

A row of R elements becomes (8 / bits) equal parts of m bytes, m = ceil(R * bits / 8): code p * m + j stands in
byte j, at bit p * bits; codes past R repeat the last element. An element decodes to code * scale + low, with one
float32 pair (scale, low) per row; the pair is NaN where the row holds a NaN or an infinity.

Where the codec is one of roots, all that is said of elements there is of their roots.
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
    """Bytes of one row's codes."""
    return -(-row * bits // 8)


def rooted(x: Tensor) -> Tensor:
    """Square roots of float32 magnitudes, signs kept, by halving the exponent: straight lines between powers of two.

    Zeros of either sign become 1.5 * 2^-64, whose square is taken for 0.
    """
    root = (((x.view(torch.int32) & _MAGNITUDE) >> 1) + _ONE).view(torch.float32)
    return torch.where(x.isfinite(), torch.where(x < 0, -root, root), x)


def squared(y: Tensor) -> Tensor:
    """Undoes :func:`rooted`, to the last bit."""
    half = y.abs().view(torch.int32) - _ONE
    square = (half.clamp_(0, _LARGEST >> 1) << 1).view(torch.float32)
    return torch.where(y.isfinite(), square.copysign(y), y)


def pack_rows(rows: Tensor, bits: int, root: bool) -> tuple[Tensor, Tensor]:
    """Float32 rows [n, R], or their roots, as uint8 codes [n, m] and float32 parameters [n, 2]."""
    rows = rooted(rows) if root else rows
    parts, levels = 8 // bits, (1 << bits) - 1
    padding = code_bytes(rows.shape[1], bits) * parts - rows.shape[1]
    if padding:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, padding)], 1)
    low, high = rows.aminmax(dim=1, keepdim=True)
    share = torch.tensor(2 / levels, dtype=torch.float32, device=rows.device)
    scale = (high * 0.5 - low * 0.5) * share  # high - low may overflow
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    hard = (scale < 1e-30) | ((low * inverse).abs() > 2.0**18)  # no finite inverse, or its product is too coarse
    # both ways for every row: with a branch, the memory that this takes would depend on the data
    up = torch.where(scale < 1e-30, 2.0**60, 1.0)
    exact = torch.where(scale == 0, 0.0, 1 / (scale * up))
    hard_rounded = _fused((rows - low) * up, exact, _ROUND)
    rounded = torch.where(hard, hard_rounded, _fused(rows, inverse, -(low * inverse).double()) + _ROUND)
    codes = rounded.view(torch.int32).bitwise_and_(levels).view(rows.shape[0], parts, -1)
    finite = low.isfinite() & high.isfinite()
    joined = codes[:, 0] * finite
    for part in range(1, parts):
        joined |= (codes[:, part] << (bits * part)) * finite
    parameters = torch.cat([scale, low], 1).masked_fill_(~finite, math.nan)
    return joined.to(torch.uint8), parameters


def _fused(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """a * b + c with float32 rounding at the end only, as a fused multiply-add has it.

    The product is exact in float64. The sum is not, and rounding it again would see a tie where there is none: so its
    last bit is set where something was lost (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
    """
    product = a.double().mul_(b.double())
    total = product + c
    of_c = total - product
    lost = product.sub_(total - of_c).add_(c - of_c)
    del of_c
    to_odd = (lost != 0).logical_and_(total.view(torch.int64).bitwise_and(1) == 0)
    return torch.where(to_odd, total.nextafter(lost.sign_().mul_(math.inf)), total).float()


def unpack_rows(codes: Tensor, parameters: Tensor, row: int, bits: int, root: bool) -> Tensor:
    """What :func:`pack_rows` made, as float32 [n, row]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    split = (codes[:, None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    scale, low = parameters[:, :1], parameters[:, 1:]
    limit = torch.finfo(torch.float32).max
    # near the end of float32 a row is restored at half its size, or the widest range would overflow
    half = torch.where(scale * ((1 << bits) - 1) + low.abs() < 1.7e38, 1.0, 0.5)
    codes_f = split.reshape(codes.shape[0], -1)[:, :row].float()
    rows = _fused(codes_f, scale * half, (low * half).double())
    rows.mul_(1 / half).clamp_(-limit, limit)
    return squared(rows) if root else rows


def pack_e4m3(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 blocks [n, B] as e4m3 bytes [n, B], ties away from zero, and the blocks' float32 units [n].

    A unit is the power of two that brings a block's largest |x| into [128, 256); NaN where that is not finite.
    """
    largest = blocks.abs().amax(1, keepdim=True)
    largest = torch.where(largest.isfinite() & ~blocks.isnan().any(1, keepdim=True), largest, math.nan)
    exponent = ((largest.view(torch.int32) >> 23) - 7).clamp_(min=1)  # the unit's inverse must be a float32 too
    unit = torch.where(largest.isnan(), math.nan, (exponent << 23).view(torch.float32))
    y = (blocks * (1 / unit)).view(torch.int32)
    magnitude = y & 0x7FFFFFFF
    fine = (magnitude.view(torch.float32).double() * 2**9 + 0.5).int()  # below 2^-6 values are 2^-9 apart
    coarse = ((magnitude + 0x80000) >> 20) - (120 << 3)
    rounded = torch.where(magnitude < 0x3C800000, fine, coarse)
    rounded = torch.minimum(rounded, torch.where(exponent == 247, 0x77, 0x7F))  # 256 units would be infinite there
    codes = (rounded | ((y >> 24) & 0x80)) * ~largest.isnan()
    return codes.to(torch.uint8), unit[:, 0]


def unpack_e4m3(codes: Tensor, units: Tensor) -> Tensor:
    """What :func:`pack_e4m3` made, as float32."""
    return codes.view(torch.float8_e4m3fn).float().mul_(units[:, None])


FP8_BLOCK = 4096  # elements with one unit


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
