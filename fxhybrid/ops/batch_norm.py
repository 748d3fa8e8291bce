"""Batch norm's backward pass with little workspace.

ATen allocates the input gradient twice and works on whole tensors; channels are independent, so a few at a
time give the very same bits with a small buffer that stays in the cache. In channels_last it is some pixels at a time,
and sums are taken in another order than ATen's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20
PIXELS_BYTES = 1 << 18  # in channels_last: four operators in turn read what is in the nearer cache
_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "batch_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, float eps,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_whole = torch.ops.aten.native_batch_norm_backward.default
Three = tuple[Tensor, Tensor, Tensor]


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
    output_mask: Sequence[bool],
) -> Three:
    """Computes ``native_batch_norm_backward`` in training mode, for tensors in one memory format, part by part."""
    if not x.is_contiguous():
        return _by_pixels(gradient, x, weight, mean, invstd, output_mask)
    n_channels = x.shape[1]
    step = max(1, CHUNK_BYTES * n_channels // max(x.nbytes, 1))
    mask = list(output_mask)
    if step >= n_channels:
        return _whole(gradient, x, weight, None, None, mean, invstd, True, eps, mask)  # type: ignore[no-any-return]
    like = mean if weight is None else weight
    results = (torch.empty_like(x) if mask[0] else x.new_empty(0), torch.empty_like(like), torch.empty_like(like))
    for start in range(0, n_channels, step):
        part = slice(start, start + step)
        found = _whole(
            gradient[:, part].contiguous(),
            x[:, part].contiguous(),
            None if weight is None else weight[part],
            None,
            None,
            mean[part],
            invstd[part],
            True,
            eps,
            mask,
        )
        if mask[0]:
            results[0][:, part] = found[0]
        for i in (1, 2):
            if mask[i]:
                results[i][part] = found[i]
    return results


def _by_pixels(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, output_mask: Sequence[bool]
) -> Three:
    """Computes the same in channels_last, some pixels at a time.

    With g the gradient, n pixels and sums over all of them, the input's gradient is
    weight * invstd * (g - sum(g) / n - (x - mean) * invstd^2 * sum(g (x - mean)) / n).
    """
    g, pixels = (t.permute(0, 2, 3, 1).view(-1, x.shape[1]) for t in (gradient, x))
    step = max(1, PIXELS_BYTES // (pixels.shape[1] * x.itemsize))
    parts = torch.split(g, step), torch.split(pixels, step)
    buffer = torch.empty_like(pixels[:step])
    total, product = torch.zeros_like(mean), torch.zeros_like(mean)
    for part, some in zip(*parts, strict=True):
        centred = torch.sub(some, mean, out=buffer[: some.shape[0]])
        product += centred.mul_(part).sum(0)
        total += part.sum(0)
    result = torch.empty_like(x) if output_mask[0] else x.new_empty(0)
    if output_mask[0]:
        n_pixels = pixels.shape[0]
        slope = invstd if weight is None else weight * invstd
        of_x = -slope * invstd * invstd * product / n_pixels
        constant = -slope * total / n_pixels - of_x * mean
        targets = torch.split(result.permute(0, 2, 3, 1).view_as(pixels), step)
        for target, part, some in zip(targets, *parts, strict=True):
            torch.mul(some, of_x, out=target).addcmul_(part, slope).add_(constant)
    return result, product * invstd, total


def _fake(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
    output_mask: Sequence[bool],
) -> Three:
    like = mean if weight is None else weight
    return torch.empty_like(x), torch.empty_like(like), torch.empty_like(like)


_LIBRARY.impl("batch_norm_backward", batch_norm_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fxhybrid::batch_norm_backward", _fake, lib=_LIBRARY)
