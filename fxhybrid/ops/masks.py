"""Two operators that let a backward pass live on one bit where it used to need a float.

ATen can do both with ``le`` and ``where``, but on CPU these cost ten times a ``threshold_backward``; here the
work goes chunk by chunk through kernels that are fast, and what lies between stays in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements worked on at a time: enough for two threads to be worth waking, little next to the tensor.
FEWEST, MOST, PARTS = 1 << 14, 1 << 18, 8
_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("keep_mask(Tensor x, float lower, float? upper) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define("apply_mask(Tensor gradient, Tensor mask) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define("apply_mask_(Tensor(a!) gradient, Tensor mask) -> Tensor(a!)", tags=torch.Tag.pt2_compliant_tag)
_thresholded = torch.ops.aten.threshold_backward.grad_input
_clamped = torch.ops.aten.hardtanh_backward.grad_input


def _chunk(numel: int) -> int:
    return min(max(numel // PARTS, FEWEST), MOST, max(numel, 1))


def _storage_order(x: Tensor) -> Tensor | None:
    """Returns the elements of a dense tensor as one dimension in storage order; None if it is not dense."""
    size, expected = sorted(zip(x.stride(), x.shape, strict=True)), 1
    for stride, length in size:
        if length == 1:
            continue
        if stride != expected:
            return None
        expected *= length
    return x.as_strided((x.numel(),), (1,))


def _mask_backward(gradient: Tensor, x: Tensor, lower: float, upper: float | None, out: Tensor) -> None:
    if upper is None:
        _thresholded(gradient, x, lower, grad_input=out)
    else:
        _clamped(gradient, x, lower, upper, grad_input=out)


def keep_mask(x: Tensor, lower: float, upper: float | None) -> Tensor:
    """Returns False where ``x <= lower`` or ``x >= upper``, else True (NaN included); strides as ``x``."""
    mask = torch.empty_like(x, dtype=torch.bool)
    flat, out = _storage_order(x), _storage_order(mask)
    if flat is None or out is None or x.stride() != mask.stride():
        keep = ~(x <= lower)
        return mask.copy_(keep if upper is None else keep & ~(x >= upper))
    chunk = _chunk(x.numel())
    ones, kept = x.new_ones(chunk), x.new_empty(chunk)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        n = part.numel()
        _mask_backward(ones[:n], part, lower, upper, kept[:n])
        out[start : start + chunk].copy_(kept[:n])
    return mask


def apply_mask(gradient: Tensor, mask: Tensor) -> Tensor:
    """Returns ``gradient`` where ``mask``, else 0; strides as ``gradient``."""
    return _apply_mask(gradient, mask, torch.empty_like(gradient))


def apply_mask_(gradient: Tensor, mask: Tensor) -> Tensor:
    """Does the same in place."""
    return _apply_mask(gradient, mask, gradient)


def _apply_mask(gradient: Tensor, mask: Tensor, result: Tensor) -> Tensor:
    flat, keep, out = _storage_order(gradient), _storage_order(mask), _storage_order(result)
    aligned = gradient.stride() == mask.stride() == result.stride()
    if flat is None or keep is None or out is None or not aligned:
        return result.copy_(torch.where(mask, gradient, 0))
    bits = keep.view(torch.uint8)  # conversion from bool to float is slow, from uint8 it is not
    chunk = _chunk(gradient.numel())
    kept = gradient.new_empty(chunk)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        n = part.numel()
        kept[:n].copy_(bits[start : start + chunk])
        _thresholded(part, kept[:n], 0, grad_input=out[start : start + chunk])
    return result


def _fake_keep_mask(x: Tensor, lower: float, upper: float | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def _fake_apply_mask(gradient: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _fake_apply_mask_(gradient: Tensor, mask: Tensor) -> Tensor:
    return gradient


for _name, _real, _fake in (
    ("keep_mask", keep_mask, _fake_keep_mask),
    ("apply_mask", apply_mask, _fake_apply_mask),
    ("apply_mask_", apply_mask_, _fake_apply_mask_),
):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxhybrid::{_name}", _fake, lib=_LIBRARY)

APPLY_MASK = torch.ops.fxhybrid.apply_mask.default
APPLY_MASK_IN_PLACE = torch.ops.fxhybrid.apply_mask_.default
