"""Made-up inputs, on which an operator can be timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxhybrid.codecs import TensorMeta, get_codec

aten = torch.ops.aten
PATTERN = 4099  # prime, so that rows differ


def made_up_arguments(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Real tensors in place of the fake ones, on which ``target`` can run."""
    if target is torch.ops.fxhybrid.compress.default:
        value, codec = args
        return (_encodable(codec, value), codec), {}
    if target is torch.ops.fxhybrid.decompress.default:
        qdata, _, codec, size, stride, dtype = args
        value = qdata.new_empty_strided(size, stride, dtype=dtype)
        return (*get_codec(codec).encode(_encodable(codec, value)), *args[2:]), {}
    schema = target._schema.arguments if hasattr(target, "_schema") else ()
    names = [argument.name for argument in schema] + [""] * len(args)

    def real(value: Any, name: str) -> Any:
        limit = _index_limit(target, args, name)
        return fx.node.map_aggregate(value, lambda v: _real(v, limit))

    made = tuple(real(value, name) for value, name in zip(args, names, strict=False))
    return made, {name: real(value, name) for name, value in kwargs.items()}


def _encodable(codec: str, value: torch.Tensor) -> torch.Tensor:
    """Made-up data like ``value`` that ``codec`` may encode."""
    example = get_codec(codec).example(TensorMeta.of(value), value.device)
    return _real(value, 1) if example is None else example


def _index_limit(target: Any, args: tuple[Any, ...], argument: str) -> int:
    """Integer inputs named ``argument`` are drawn from [0, limit): what the operator's indices may be."""
    if target is aten.embedding.default and argument == "indices":
        return int(args[0].shape[0])
    if target is aten.embedding_dense_backward.default and argument == "indices":
        return int(args[2])
    if target in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default) and argument == "target":
        return int(args[0].shape[1])
    if target in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default) and argument == "target":
        return int(args[1].shape[1])
    return 1


def _real(value: Any, limit: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    n_elements = value.untyped_storage().nbytes() // value.dtype.itemsize
    if value.dtype.is_floating_point:
        base = _pattern(value.device).to(value.dtype).repeat(n_elements // PATTERN + 1)[:n_elements]
    elif value.dtype is torch.bool:
        base = torch.rand(n_elements, device=value.device) > 0.5
    elif value.dtype.is_complex:
        base = torch.rand(n_elements, dtype=value.dtype, device=value.device)
    else:
        base = torch.randint(0, limit, (n_elements,), dtype=value.dtype, device=value.device)
    return base.as_strided(value.shape, value.stride(), value.storage_offset())


def _pattern(device: torch.device) -> torch.Tensor:
    """Values in [0.5, 1.5): fit for logarithms, divisions and square roots."""
    return torch.rand(PATTERN, device=device).add_(0.5)
