"""Synthetic inputs, on which an operator can be timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.ops import ctc_loss as ctc_loss  # registers the operators below
from fxhybrid.ops import masked_sum as masked_sum

aten = torch.ops.aten
PATTERN = 4099  # prime, so that rows differ

Arguments = Mapping[str, Any]
Values = Callable[[Tensor, Arguments], Tensor]


def synthetic_arguments(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Makes real tensors in the place of fake ones, with values that ``target`` takes."""
    if target is torch.ops.fxhybrid.compress.default:
        value, codec = args
        return (_encodable(codec, value), codec), {}
    if target is torch.ops.fxhybrid.decompress.default:
        qdata, _, codec, size, stride, dtype = args
        value = qdata.new_empty_strided(size, stride, dtype=dtype)
        return (*get_codec(codec).encode(_encodable(codec, value)), *args[2:]), {}
    schema = target._schema.arguments if hasattr(target, "_schema") else ()
    names = [argument.name for argument in schema]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    made = {name: _argument(target, name, value, named) for name, value in named.items()}
    nameless = (_argument(target, "", value, named) for value in args[len(names) :])
    return (*(made[name] for name in names[: len(args)]), *nameless), {name: made[name] for name in kwargs}


def _argument(target: Any, name: str, value: Any, named: Arguments) -> Any:
    """One argument, with tensors of the values that it needs in the place of all fake ones."""
    values = _VALUES.get((getattr(target, "overloadpacket", target), name), _plain)
    return fx.node.map_aggregate(value, lambda v: _laid_out(values(v, named), v) if isinstance(v, Tensor) else v)


def _encodable(codec: str, value: Tensor) -> Tensor:
    """Data like ``value`` that ``codec`` may encode."""
    example = get_codec(codec).example(TensorMeta.of(value), value.device)
    return _laid_out(_plain(value, {}), value) if example is None else example


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """The elements of a storage as a tensor with the strides of ``like``."""
    return values.as_strided(like.shape, like.stride(), like.storage_offset())


def _n_elements(like: Tensor) -> int:
    """How many elements the storage of ``like`` holds."""
    return like.untyped_storage().nbytes() // like.dtype.itemsize


# -- values: each makes all elements of one storage -----------------------------------------------------------


def _plain(like: Tensor, _: Arguments) -> Tensor:
    """Floats fit for logarithms, divisions and square roots; integers that are 0, the first index of anything."""
    n = _n_elements(like)
    if like.dtype.is_floating_point:
        pattern = torch.rand(PATTERN, device=like.device).add_(0.5).to(like.dtype)
        return pattern.repeat(n // PATTERN + 1)[:n]
    if like.dtype is torch.bool:
        return torch.rand(n, device=like.device) > 0.5
    if like.dtype.is_complex:
        return torch.rand(n, dtype=like.dtype, device=like.device)
    return torch.zeros(n, dtype=like.dtype, device=like.device)


def _probabilities(like: Tensor, named: Arguments) -> Tensor:
    """Floats in [0.25, 0.75)."""
    return _plain(like, named).sub_(0.5).mul_(0.5).add_(0.25) if like.dtype.is_floating_point else _plain(like, named)


def _true(like: Tensor, _: Arguments) -> Tensor:
    return torch.ones(_n_elements(like), dtype=like.dtype, device=like.device)


def _pivots(like: Tensor, _: Arguments) -> Tensor:
    """Rows 1, 2, ... that are exchanged with themselves."""
    n = like.shape[-1] if like.dim() else 1
    return torch.arange(1, n + 1, dtype=like.dtype, device=like.device).repeat(-(-_n_elements(like) // max(n, 1)))


def _few(wanted: Callable[[Arguments], int]) -> Values:
    """A mask that lets no more elements through than there are to put in their place."""

    def values(like: Tensor, named: Arguments) -> Tensor:
        n = _n_elements(like)
        copies = max(like.numel() // max(n, 1), 1)  # of each element, where the mask is expanded
        mask = torch.zeros(n, dtype=like.dtype, device=like.device)
        mask[: wanted(named) // copies] = True
        return mask

    return values


def _indices(limit: Callable[[Arguments], int]) -> Values:
    """Integers in [0, limit)."""

    def values(like: Tensor, named: Arguments) -> Tensor:
        return torch.randint(0, limit(named), (_n_elements(like),), dtype=like.dtype, device=like.device)

    return values


def _all_steps(like: Tensor, named: Arguments) -> Tensor:
    """Sequences of full length."""
    return torch.full((_n_elements(like),), named["log_probs"].shape[0], dtype=like.dtype, device=like.device)


def _longest_targets(like: Tensor, named: Arguments) -> Tensor:
    """The lengths for which a CTC loss needs most: all of them full, or one that has all of the labels."""
    targets = named["targets"]
    lengths = torch.zeros(_n_elements(like), dtype=like.dtype, device=like.device)
    lengths[: None if targets.dim() == 2 else 1] = targets.shape[-1]
    return lengths


def _classes(named: Arguments) -> int:
    """How many classes the scores of a loss have: dimension 1, or the only one."""
    return int(named["self"].shape[min(1, named["self"].dim() - 1)])


def _rows(named: Arguments) -> int:
    return int(named["weight"].shape[0])


_TARGETS = (aten.nll_loss_forward, aten.nll_loss2d_forward, aten.nll_loss_backward, aten.nll_loss2d_backward)
_CROSS_ENTROPIES = (aten.binary_cross_entropy, aten.binary_cross_entropy_backward)
_CTC_LOSSES = (torch.ops.fxhybrid.ctc_loss, torch.ops.fxhybrid.ctc_loss_backward)
_VALUES: dict[tuple[Any, str], Values] = {
    (aten.embedding, "indices"): _indices(_rows),
    (aten.embedding_dense_backward, "indices"): _indices(lambda named: int(named["num_weights"])),
    **{(op, "target"): _indices(_classes) for op in _TARGETS},
    **{(op, name): _probabilities for op in _CROSS_ENTROPIES for name in ("self", "target")},
    **{(op, "input_lengths"): _all_steps for op in _CTC_LOSSES},
    **{(op, "target_lengths"): _longest_targets for op in _CTC_LOSSES},
    (aten.bernoulli, "self"): _probabilities,
    (aten.bernoulli, "p"): _probabilities,
    (aten.binomial, "prob"): _probabilities,
    (aten.fractional_max_pool2d, "random_samples"): _probabilities,
    (aten.fractional_max_pool3d, "random_samples"): _probabilities,
    (aten.masked_scatter, "mask"): _few(lambda named: named["source"].numel()),
    (aten.masked_scatter_backward, "mask"): _few(lambda named: math.prod(named["sizes"])),
    (aten._assert_async, "self"): _true,
    (torch.ops.fxhybrid.masked_sum, "mask"): _true,  # all elements are chosen, for which it needs most
    (aten.linalg_lu_solve, "pivots"): _pivots,
    (aten.linalg_ldl_solve, "pivots"): _pivots,
    (aten.lu_unpack, "LU_pivots"): _pivots,
}
