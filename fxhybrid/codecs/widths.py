"""Widths of channels: the assignment of 2, 4 or 8 bits with the least error at a given number of bytes.

Data:       channel c (or group of neighbours) has weight v_c, its mean squared row range; a row of width w has error
            v_c / (2^w - 1)^2 up to a common factor, and b_w bytes, the same for all channels.
Variables:  w_c in {2, 4, 8}.
Model:      minimise sum_c v_c / (2^w_c - 1)^2 subject to sum_c b_(w_c) <= total_bytes.

Swapping the widths of two channels shows that some best assignment never gives a wider one to a lighter channel.
So with channels sorted by weight, 8 bits go to the first i, 4 to the next j and 2 to the rest; given i, the most j
that fits is best, and trying every i is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from fxhybrid.errors import CodecError

SHORTEST_ROW = 128  # shorter rows spend more than a tenth of the 4-bit codes on parameters, and take longer
STEP_ERROR = {width: 1 / ((1 << width) - 1) ** 2 for width in (8, 4, 2)}


def channels_per_row(n_channels: int, plane: int) -> int:
    """How many neighbouring channels form a row: enough for ``SHORTEST_ROW`` elements and whole bytes at 2 bits."""
    counts = (k for k in range(1, n_channels + 1) if n_channels % k == 0)
    return next((k for k in counts if k * plane >= SHORTEST_ROW and k * plane % 4 == 0), 1)


def channel_weights(x: Tensor, per_row: int = 1) -> tuple[float, ...]:
    """Mean squared range over the samples of x [N, C, ...], of each row of ``per_row`` channels."""
    low, high = x.detach().float().reshape(x.shape[0], x.shape[1] // per_row, -1).aminmax(dim=2)
    weights: list[float] = (high - low).double().square().mean(0).tolist()
    return tuple(weights)


def assign_widths(weights: Sequence[float], row_bytes: Mapping[int, int], total_bytes: int) -> tuple[int, ...]:
    """The width of each channel.

    Args:
        weights: of each channel; not negative.
        row_bytes: bytes of one channel's row at each width 2, 4 and 8; increasing.
        total_bytes: what all rows may take together.

    Raises:
        CodecError: not even 2 bits fit for every channel.
    """
    n, (narrow, middle, wide) = len(weights), (row_bytes[width] for width in (2, 4, 8))
    if n * narrow > total_bytes:
        raise CodecError(f"{n} channels take {n * narrow} bytes at 2 bits each, more than {total_bytes}")
    order = sorted(range(n), key=lambda c: (-weights[c], c))
    sums = [0.0, *accumulate(weights[c] for c in order)]
    best = (float("inf"), 0, 0)
    for n_wide in range(n + 1):
        left = total_bytes - n_wide * wide - (n - n_wide) * narrow
        if left < 0:
            break
        end = min(n, n_wide + left // (middle - narrow))
        error = sums[n_wide] * STEP_ERROR[8] + (sums[end] - sums[n_wide]) * STEP_ERROR[4]
        best = min(best, (error + (sums[n] - sums[end]) * STEP_ERROR[2], n_wide, end))
    _, n_wide, end = best
    widths = [2] * n
    for place, channel in enumerate(order[:end]):
        widths[channel] = 8 if place < n_wide else 4
    return tuple(widths)
