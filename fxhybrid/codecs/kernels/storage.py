"""What is known of a tensor before it exists: shape, strides and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorMeta:
    """Holds shape, strides and dtype of a tensor.

    Attributes:
        shape: size of each dimension.
        stride: step of each dimension, in elements.
        dtype: element type.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """Returns the meta of a tensor, real or fake."""
        return cls(tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype)

    @property
    def numel(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the elements: the storage of a dense tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def storage_order(self) -> tuple[int, ...]:
        """Returns the dimensions from the outermost to the innermost in storage; ties keep their order."""
        return tuple(sorted(range(len(self.shape)), key=lambda dim: (-self.stride[dim], dim)))

    @property
    def is_dense(self) -> bool:
        """Tells whether the elements fill one block without gaps or overlaps, in any order of dimensions."""
        if len(self.shape) != len(self.stride):
            return False
        if self.numel == 0:
            return True
        expected = 1
        for dim in sorted(range(len(self.shape)), key=self.stride.__getitem__):
            if self.shape[dim] == 1:  # the stride of such a dimension is never used
                continue
            if self.stride[dim] != expected:
                return False
            expected *= self.shape[dim]
        return True


def storage_view(tensor: Tensor) -> Tensor:
    """Views a dense tensor's elements as one dimension in storage order, outside autograd: a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
