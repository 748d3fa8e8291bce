"""Which tensors of a call lie in the same memory: a graph that writes to one of them holds for that pattern only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Pattern = frozenset[tuple[int, int]]


def overlap_pattern(tensors: Sequence[Tensor]) -> Pattern:
    """Returns the positions of all pairs of tensors whose extents in memory meet."""
    extents = [_extent(tensor) for tensor in tensors]
    return frozenset(
        (i, j)
        for i, (start, end) in enumerate(extents)
        for j, (other_start, other_end) in enumerate(extents[:i])
        if start < other_end and other_start < end
    )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last; an empty tensor meets none."""
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
