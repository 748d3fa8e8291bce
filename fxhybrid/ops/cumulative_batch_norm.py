"""Batch norm whose running statistics are the plain average over all batches (``momentum=None``).

The weight of a batch is one over the number of batches so far, a Python number read from a buffer, which no graph can
hold. The operator here reads it when it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

aten = torch.ops.aten
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


torchs_forward = _BatchNorm.forward  # a global, since guards on what a closure holds would fail after the trace


@contextlib.contextmanager
def traceable_batch_norm() -> Iterator[None]:
    """Lets batch norms with ``momentum=None`` run the operator of this module, while a model is traced."""
    patched: Any = _BatchNorm
    patched.forward = forward
    try:
        yield
    finally:
        patched.forward = torchs_forward


def forward(self: _BatchNorm, input: Tensor) -> Tensor:
    """Does what a batch norm does in eager."""
    count, mean, variance = self.num_batches_tracked, self.running_mean, self.running_var
    counts = self.momentum is None and self.training and self.track_running_stats
    if not counts or count is None or mean is None or variance is None:
        return torchs_forward(self, input)
    self._check_input_dim(input)  # type: ignore[no-untyped-call]
    count.add_(1)
    results = torch.ops.fxhybrid.cumulative_batch_norm(input, self.weight, self.bias, mean, variance, count, self.eps)
    with torch.no_grad():
        mean.copy_(results[3])
        variance.copy_(results[4])
    first: Tensor = results[0]
    return first


@torch.library.custom_op("fxhybrid::cumulative_batch_norm", mutates_args=())
def cumulative_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor,
    eps: float,
) -> Five:
    """Normalizes ``x`` by its own statistics.

    Returns the output, mean and inverse deviation of each channel, and the new running mean and variance, in which
    this batch weighs ``1 / count``.
    """
    return _normalize(x, weight, bias, running_mean, running_var, 1.0 / float(count), eps)


@cumulative_batch_norm.register_fake
def _(*inputs: Any) -> Five:
    x, weight, bias, mean, variance, _, eps = inputs
    return _normalize(x, weight, bias, mean, variance, 1.0, eps)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Five:
    mean, variance = running_mean.clone(), running_var.clone()
    results = aten.native_batch_norm.default(x, weight, bias, mean, variance, True, momentum, eps)
    return (*results, mean, variance)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    x, weight, bias, *_, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])
    ctx.mask = [t is not None and t.requires_grad for t in (x, weight, bias)]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, mean, invstd = ctx.saved_tensors
    found = aten.native_batch_norm_backward.default(
        gradient, x, weight, None, None, mean, invstd, True, ctx.eps, ctx.mask
    )
    gradients = (g if wanted else None for g, wanted in zip(found, ctx.mask, strict=True))
    return (*gradients, None, None, None, None)


cumulative_batch_norm.register_autograd(_backward, setup_context=_setup_context)
