"""Strides of what the model, or autograd, changes in place.

AOTAutograd traces an operator in place as one that gives a new tensor, and some of these give a contiguous one where
the tensor that eager changes keeps its strides. What is summed next would be rounded in another way. Along a dimension
of one element even elementwise ones do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
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
            result = torchs_own(self, op, types, args, kwargs)
            if _changes_first(op):
                _keep_strides_of_ones(args[0])
            return result
        with self:
            if op in _FILLS and (order := _order_in_memory(args[0])):
                return _fill(order, *args)
            return args[0].copy_(_GIVE_CONTIGUOUS[op](*args, **(kwargs or {})))

    with patch.object(FunctionalTensorMode, "__torch_dispatch__", dispatch):
        yield


@cache
def _changes_first(op: Any) -> bool:
    """Tells whether an operator writes to its first argument and gives it back."""
    arguments, returns = op._schema.arguments, op._schema.returns
    if not arguments or len(returns) != 1 or arguments[0].alias_info is None:
        return False
    return bool(arguments[0].alias_info.is_write and returns[0].alias_info is not None)


def _keep_strides_of_ones(changed: Any) -> None:
    """Lets a changed tensor keep strides along dimensions of one element: convolutions choose kernels by them."""
    if not isinstance(changed, FunctionalTensor) or 1 not in [s for s in changed.shape if isinstance(s, int)]:
        return
    value = changed.from_functional()
    strides = zip(changed.shape, changed.stride(), value.stride(), strict=True)
    differing = [size for size, old, new in strides if _hint(old) != _hint(new)]
    if differing and all(isinstance(size, int) and size == 1 for size in differing):
        changed.replace_(value.as_strided(changed.shape, changed.stride(), value.storage_offset()))
        changed.commit_update()
        changed.sync()


def _hint(stride: Any) -> int:
    """Returns a stride as a number; comparing symbolic ones would make guards of it."""
    return int(stride.node.hint) if isinstance(stride, torch.SymInt) else int(stride)


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
