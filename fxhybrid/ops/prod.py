"""Products of all elements, or along a dimension, as opaque operators.

Eager's gradient looks at the values: it divides by them where none is zero. A trace cannot, and rounds in another way.
The backward operator here runs eager's own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxhybrid.ops.recurrent import differentiable

aten = torch.ops.aten


def _product(x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    return torch.prod(x) if dim is None else torch.prod(x, dim, keepdim)


@torch.library.custom_op("fxhybrid::prod", mutates_args=())
def prod(x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    """Computes ``torch.prod``; of all elements where ``dim`` is None."""
    return _product(x, dim, keepdim)


@prod.register_fake
def _(x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    if dim is None:
        return x.new_empty(())
    sizes = list(x.shape)
    if sizes:
        sizes[dim] = 1
    result = x.new_empty(sizes)
    return result if keepdim or not sizes else result.squeeze(dim)


@torch.library.custom_op("fxhybrid::prod_backward", mutates_args=())
def prod_backward(gradient: Tensor, x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    """Computes the gradient of ``x``, in the layout of ``x``."""
    with differentiable():
        leaf = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(_product(leaf, dim, keepdim), leaf, gradient)
    return torch.empty_like(x).copy_(found)


@prod_backward.register_fake
def _(gradient: Tensor, x: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.keepdim = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.fxhybrid.prod_backward(gradient, x, ctx.dim, ctx.keepdim), None, None


prod.register_autograd(_backward, setup_context=_setup_context)


def whole_prod(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Stands in for ``aten.prod`` in a trace."""
    wanted = dtype or (x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64)
    result: Tensor = torch.ops.fxhybrid.prod(x if x.dtype is wanted else x.to(wanted), dim, keepdim)
    return result


REPLACEMENTS = {aten.prod.default: whole_prod, aten.prod.dim_int: whole_prod}
