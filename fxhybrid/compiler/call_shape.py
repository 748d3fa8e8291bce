"""Shapes of a call's arguments: which kind of call it is, and in which sizes two calls of a kind differ."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxhybrid.capture.step import StepCall
from fxhybrid.capture.symbolic import Dims


@dataclass(frozen=True, eq=False)
class CallShape:
    """Describes a call's arguments without their values.

    Attributes:
        kind: structure, types, Python values, and which sizes are 0 or 1: traces differ there whatever is symbolic.
        sizes: of each leaf that is a tensor, by its position.
        leaves: the arguments, with tensors that have no data.
        structure: puts leaves into the form of a call again.
    """

    kind: Hashable
    sizes: dict[int, tuple[int, ...]]
    leaves: tuple[object, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, call: StepCall) -> CallShape:
        """Returns the shape of a call."""
        leaves, structure = pytree.tree_flatten(tuple(call))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        same = tuple(next(j for j in tensors if leaves[j] is leaf) for leaf in tensors.values())
        kinds = (_tensor_kind(leaf) if isinstance(leaf, Tensor) else _value_kind(leaf) for leaf in leaves)
        return cls(
            (str(structure), same, tuple(kinds)),
            {i: tuple(tensor.shape) for i, tensor in tensors.items()},
            tuple(_without_data(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves),
            structure,
        )

    def call(self) -> StepCall:
        """Returns a call of this shape, its tensors without data."""
        return StepCall(*pytree.tree_unflatten(list(self.leaves), self.structure))

    def differing(self, other: CallShape) -> Dims:
        """Returns the dimensions in which a call of the same kind differs."""
        pairs = ((i, zip(size, other.sizes[i], strict=True)) for i, size in self.sizes.items())
        dims = {i: frozenset(dim for dim, (mine, theirs) in enumerate(pair) if mine != theirs) for i, pair in pairs}
        return {i: found for i, found in dims.items() if found}

    def batch_dims(self) -> Dims:
        """Returns the first dimension of all tensors if they agree in it: then it is most likely the batch."""
        first = {i: size[0] for i, size in self.sizes.items() if size}
        if len(set(first.values())) != 1 or min(first.values()) <= 1:
            return {}
        return dict.fromkeys(first, frozenset([0]))

    def alike(self, other: CallShape, dims: Dims) -> Dims:
        """Returns those of ``dims`` that have the size of others of them in this and in another call of the kind."""
        pairs = {(i, d): (self.sizes[i][d], other.sizes[i][d]) for i, each in dims.items() for d in sorted(each)}
        first = {mine: (mine, theirs) for mine, theirs in reversed(pairs.values())}
        shared = [place for place, pair in pairs.items() if first[pair[0]] == pair]
        return joined(*({i: frozenset([d])} for i, d in shared))


def joined(*dims: Dims) -> Dims:
    """Returns the dimensions that are in any of ``dims``."""
    positions = {position for each in dims for position in each}
    return {i: frozenset().union(*(each.get(i, ()) for each in dims)) for i in sorted(positions)}


def _tensor_kind(tensor: Tensor) -> Hashable:
    strides = tuple(map(int, tensor.stride())) if _is_plain(tensor) else ()
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    small = tuple(size if size <= 1 else None for size in tensor.shape)
    return tensor.dtype, tensor.device, tensor.requires_grad, small, tuple(order)


def _value_kind(leaf: object) -> Hashable:
    """Returns a Python value with its type; floats are inputs of the graph, whatever they are."""
    return type(leaf), None if isinstance(leaf, float) else leaf


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _without_data(tensor: Tensor) -> Tensor:
    if not _is_plain(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
