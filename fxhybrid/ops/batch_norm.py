"""Batch norm's backward pass with little workspace.

ATen allocates the input gradient twice and works on whole tensors; channels are independent, so a few at a
time give the very same bits with a small buffer that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20
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
    """Computes ``native_batch_norm_backward`` in training mode, for contiguous tensors, some channels at a time."""
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
