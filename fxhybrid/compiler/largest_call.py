"""The largest call that a user declares: what plans are made for before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxhybrid.capture.step import StepCall
from fxhybrid.errors import InvalidArgument

Declared = Mapping[str, Mapping[int, int]]  # largest size by argument and dimension


def largest_call(call: StepCall, model: nn.Module, declared: Declared) -> StepCall:
    """Returns a call with the declared sizes, its contents repeated as often as that takes.

    Arguments that are not declared follow in the dimensions in which they agree with a declared one: a mask or labels
    that are as long as the words.

    Raises:
        InvalidArgument: there is no such argument or dimension, or the call is larger already.
    """
    named = _named_tensors(call, model)
    _check_names(declared, named)
    grown: dict[int, Tensor] = {}
    rules = {(dim, named[name].shape[dim]): size for name, dims in declared.items() for dim, size in dims.items()}
    declared_ids = {id(named[name]): dims for name, dims in declared.items()}
    for tensor in named.values():
        sizes = declared_ids.get(id(tensor)) or _following(tensor, rules)
        grown[id(tensor)] = _grown(tensor, sizes)

    def replaced(leaf: Any) -> Any:
        return grown.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

    return StepCall(*pytree.tree_map(replaced, tuple(call)))


def _named_tensors(call: StepCall, model: nn.Module) -> dict[str, Tensor]:
    """Names the tensors of a call: arguments of forward by their names, the loss's by ``loss_args[0]``."""
    try:
        bound = inspect.signature(type(model).forward).bind(model, *call.args, **call.kwargs)
    except TypeError as error:
        raise InvalidArgument(f"the model's forward does not take these arguments: {error}") from error
    arguments = dict(list(bound.arguments.items())[1:])
    arguments |= {f"loss_args[{i}]": value for i, value in enumerate(call.loss_args)}
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        for path, leaf in pytree.tree_leaves_with_path(value):
            if isinstance(leaf, Tensor):
                found[name + pytree.keystr(path)] = leaf
    return found


def _check_names(declared: Declared, named: Mapping[str, Tensor]) -> None:
    for name, dims in declared.items():
        if name not in named:
            raise InvalidArgument(f"dynamic names {name!r}; the call has tensors {', '.join(named) or 'none'}")
        for dim, size in dims.items():
            shape = tuple(named[name].shape)
            if dim >= len(shape):
                raise InvalidArgument(f"dynamic names dimension {dim} of {name!r}, whose shape is {shape}")
            if shape[dim] > size:
                raise InvalidArgument(
                    f"dynamic says that {name!r} is at most {size} long in dimension {dim}; its shape is {shape}"
                )


def _following(tensor: Tensor, rules: Mapping[tuple[int, int], int]) -> dict[int, int]:
    return {dim: rules[dim, size] for dim, size in enumerate(tensor.shape) if (dim, size) in rules}


def _grown(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    found = tensor.detach()
    for dim, size in sizes.items():
        if found.shape[dim] < size:
            places = torch.arange(size, device=tensor.device) % max(found.shape[dim], 1)
            found = found.index_select(dim, places)
    return tensor if found.shape == tensor.shape else found.requires_grad_(tensor.requires_grad)
