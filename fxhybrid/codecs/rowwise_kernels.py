"""Row-wise quantisation of float32 rows to 8, 4 or 2 bits: the library's kernels and plain ATen.

Both write the bytes of torch's embedding tables. A row of R elements becomes R * bits / 8 code bytes,
the first element in the lowest bits, then scale and bias: float32 at 8 bits, float16 at 4 and 2.
An element decodes to code * scale + bias. Neither kernel carries NaN: the caller looks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
_LIBRARY_OPS = {
    8: ("embedding_bag_byte_prepack", "embedding_bag_byte_unpack"),
    4: ("embedding_bag_4bit_prepack", "embedding_bag_4bit_unpack"),
    2: ("embedding_bag_2bit_prepack", "embedding_bag_2bit_unpack"),
}
# The library adds this to a row's range at 8 bits, so that a constant row divides by something.
_EPSILON_8BIT = 1e-8


@dataclass(frozen=True)
class RowKernels:
    """A pair of functions on rows.

    Attributes:
        pack: float32 [rows, R] to uint8 [rows, row_bytes].
        unpack: uint8 [rows, row_bytes] to float32 [rows, R].
        small_workspace: whether a whole tensor may be given at once.
    """

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]
    small_workspace: bool


def parameter_bytes(bits: int) -> int:
    """Bytes of one row's scale and bias."""
    return 8 if bits == 8 else 4


def row_bytes(row: int, bits: int) -> int:
    """Bytes of one encoded row."""
    return row * bits // 8 + parameter_bytes(bits)


def row_parameters(packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and biases of encoded rows, each float32 [rows]."""
    dtype = torch.float32 if bits == 8 else torch.float16
    # not contiguous(): it keeps a single row where it is, at an offset that the view may refuse
    copied = packed[:, -parameter_bytes(bits) :].clone(memory_format=torch.contiguous_format)
    pairs = copied.view(dtype).float()
    return pairs[:, 0], pairs[:, 1]


def host_row_parameters(packed: Tensor, bits: int) -> tuple[Floats, Floats]:
    """The same as :func:`row_parameters` in numpy, which takes a quarter of the time on a few thousand rows."""
    columns = packed[:, -parameter_bytes(bits) :].cpu().numpy()
    pairs = columns.view(f"V{columns.shape[1]}").copy().view(np.float32 if bits == 8 else np.float16)
    scale, bias = pairs.reshape(-1, 2).T
    return scale.astype(np.float32), bias.astype(np.float32)


def library_kernels(bits: int) -> RowKernels | None:
    """The kernels of torch.ops.quantized (CPU only), or None where torch was built without them."""
    pack, unpack = (getattr(torch.ops.quantized, name, None) for name in _LIBRARY_OPS[bits])
    if pack is None or unpack is None:
        return None
    return RowKernels(pack, unpack, small_workspace=True)


def reference_kernels(bits: int) -> RowKernels:
    """The same format in plain ATen, on any device."""
    return RowKernels(
        lambda rows: _reference_pack(rows, bits),
        lambda packed: _reference_unpack(packed, bits),
        small_workspace=False,
    )


def _reference_pack(rows: Tensor, bits: int) -> Tensor:
    rows = rows.nan_to_num(0.0)
    levels = (1 << bits) - 1
    low, high = rows.amin(1), rows.amax(1)
    if bits == 8:
        scale = (high - low) / levels
        inverse = levels / (high - low + _EPSILON_8BIT)
        parameters = torch.stack([scale, low], 1)
    else:
        half_low = low.half()
        low = half_low.float()
        half_scale = _usable_scale(((high - low) / levels).half())
        inverse = 1 / half_scale.float()
        parameters = torch.stack([half_scale, half_low], 1)
    codes = ((rows - low[:, None]) * inverse[:, None]).round_().clamp_(0, levels).to(torch.uint8)
    return torch.cat([_join_codes(codes, bits), parameters.view(torch.uint8)], 1)


def _usable_scale(half_scale: Tensor) -> Tensor:
    """Scale 1 where a row is constant or its range is lost in float16: all codes are then 0."""
    return torch.where(half_scale == 0, 1.0, half_scale)


def _join_codes(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    grouped = codes.view(codes.shape[0], -1, per_byte)
    joined = grouped[..., 0].clone()
    for place in range(1, per_byte):
        joined |= grouped[..., place] << (bits * place)
    return joined


def _reference_unpack(packed: Tensor, bits: int) -> Tensor:
    scale, bias = row_parameters(packed, bits)
    joined = packed[:, : -parameter_bytes(bits)]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (joined[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(packed.shape[0], -1).float() * scale[:, None] + bias[:, None]
