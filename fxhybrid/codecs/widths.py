"""Widths of channels: 2, 4 or 8 bits each, so that the error is least for a given number of bytes.

Data:       a row of channels r (of any tensor) has error v_r at 4 bits and so v_r * 15^2 / (2^w - 1)^2 at w bits, and
            b_r(w) bytes.
Variables:  w_r in {2, 4, 8}.
Model:      minimise sum_r error_r(w_r) subject to sum_r b_r(w_r) <= total_bytes.

With a Lagrange multiplier in the place of the limit, each row chooses alone: the width of least error + multiplier *
bytes. What comes out has the least error of all choices that take as many bytes (any better one would cost less at that
multiplier, too), so bisection finds the lowest multiplier at which the bytes fit. Tensors that share a multiplier share
their bytes in the best way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SHORTEST_ROW = 128  # shorter rows spend more than a tenth of the 4-bit codes on parameters, and take longer
WIDTHS = (2, 4, 8)
STEP_ERROR = {width: 1 / ((1 << width) - 1) ** 2 for width in WIDTHS}
_HALVINGS = 100  # of the multiplier's logarithm


def channels_per_row(n_channels: int, plane: int) -> int:
    """Counts the neighbouring channels of a row: enough for ``SHORTEST_ROW`` elements and whole bytes at 2 bits."""
    counts = (k for k in range(1, n_channels + 1) if n_channels % k == 0)
    return next((k for k in counts if k * plane >= SHORTEST_ROW and k * plane % 4 == 0), 1)


def widths_at(multiplier: float, errors: Tensor, row_bytes: Mapping[int, int]) -> tuple[int, ...]:
    """Returns the width of each row at a Lagrange multiplier for bytes.

    Args:
        multiplier: squared error that is worth a byte.
        errors: squared error of each row at 4 bits.
        row_bytes: bytes of one row at each width.
    """
    costs = torch.stack([errors * (225 * STEP_ERROR[w]) + multiplier * row_bytes[w] for w in WIDTHS])
    return tuple(WIDTHS[i] for i in costs.argmin(0).tolist())


def bisect_multiplier(n_bytes: Callable[[float], int], total_bytes: int) -> float | None:
    """Finds the lowest multiplier at which ``n_bytes(multiplier)``, which falls with it, is at most ``total_bytes``.

    None if it never is.
    """
    low, high = 1e-40, 1e10
    if n_bytes(high) > total_bytes:
        return None
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if n_bytes(middle) <= total_bytes else (middle, high)
    return high
