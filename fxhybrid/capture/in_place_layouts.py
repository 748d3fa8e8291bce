"""Strides of what the model, or autograd, changes in place.

AOTAutograd traces an operator in place as one that gives a new tensor, and some of these give a contiguous one where
the tensor that eager changes keeps its strides. What is summed next would be rounded in another way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fxhybrid.torch_internals import FunctionalTensor, FunctionalTensorMode

aten = torch.ops.aten
_FILLS = (aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
_GIVE_CONTIGUOUS = {
    getattr(getattr(aten, f"{name}_"), overload): getattr(getattr(aten, name), overload)
    for name in (
        "baddbmm",
        "cumprod",
        "cumsum",
        "index_add",
        "index_copy",
        "index_reduce",
        "masked_fill",
        "masked_scatter",
        "renorm",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "tril",
        "triu",
    )
    for overload in getattr(aten, f"{name}_").overloads()
    if overload in getattr(aten, name).overloads()
}


@contextlib.contextmanager
def in_place_layouts() -> Iterator[None]:
    """Lets tensors that are changed in place keep their strides, while a model is traced."""
    torchs_own: Any = FunctionalTensorMode.__torch_dispatch__

    def dispatch(self: Any, op: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if (op not in _FILLS and op not in _GIVE_CONTIGUOUS) or not _is_strided(args[0]):
            return torchs_own(self, op, types, args, kwargs)
        with self:
            if op in _FILLS and (order := _order_in_memory(args[0])):
                return _fill(order, *args)
            return args[0].copy_(_GIVE_CONTIGUOUS[op](*args, **(kwargs or {})))

    with patch.object(FunctionalTensorMode, "__torch_dispatch__", dispatch):
        yield


def _is_strided(changed: Any) -> bool:
    """Tells whether a traced tensor has strides of its own; symbolic ones would become guards."""
    if not isinstance(changed, FunctionalTensor) or any(
        isinstance(stride, torch.SymInt) for stride in changed.stride()
    ):
        return False
    return not changed.is_contiguous()


def _order_in_memory(changed: Tensor) -> list[int]:
    """Returns the dimensions in the order in which they lie in memory; none if it has gaps."""
    order = sorted(range(changed.dim()), key=changed.stride, reverse=True)
    return order if changed.permute(order).is_contiguous() else []


def _fill(order: list[int], changed: Tensor, mask: Tensor, value: Any) -> Tensor:
    """Fills a tensor through the view of it that is contiguous: the result has its strides, without a copy."""
    changed.permute(order).masked_fill_(mask.expand(changed.shape).permute(order), value)
    return changed
