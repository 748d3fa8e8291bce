"""Operators that torch traces as Python decompositions, kept whole so that a plan runs the kernels that eager runs.

A decomposition rounds in another way than the kernel, and its parts hold more memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxhybrid.ops.prod import REPLACEMENTS
from fxhybrid.torch_internals import (
    DispatchKey,
    TorchInGraphFunctionVariable,
    dynamo_config,
    upsample_compute_output_size,
)

aten = torch.ops.aten
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
_RESIZING = (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
)
_TAKEN_APART = ("multi_margin_loss", "multilabel_margin_loss_forward", "softshrink", "hardshrink")


def _resize_with(op: Any) -> Callable[..., Tensor]:
    """Returns the form of a resizing operator that takes sizes or factors, on top of the one that takes sizes."""

    def resize(x: Tensor, output_size: Any, *rest: Any) -> Tensor:
        *corners, factors = rest
        sizes = upsample_compute_output_size(x.size(), output_size, factors)  # type: ignore[no-untyped-call]
        resized: Tensor = op(x, sizes, *corners, *(factors or [None] * len(sizes)))
        return resized

    return resize


def _dropout(x: Tensor, p: float, train: bool | None) -> Tensor:
    """Gives back its argument where nothing is dropped, as the kernel does; the decomposition copies it."""
    kept: Tensor = aten.native_dropout(x, p, train)[0] if train and p != 0 else x
    return kept


def _replacements() -> Mapping[Any, Callable[..., Tensor] | None]:
    """Returns what takes the place of each operator's decomposition; None stands for the operator itself."""
    resizing = [getattr(aten, name) for name in _RESIZING]
    whole = [*resizing, *(getattr(aten, name) for name in _TAKEN_APART)]
    own: dict[Any, Callable[..., Tensor] | None] = dict.fromkeys(op.default for op in whole)
    own[aten.dropout.default] = _dropout
    return own | {op.vec: _resize_with(op.default) for op in resizing} | REPLACEMENTS


REPLACED = _replacements()


@contextlib.contextmanager
def native_operators() -> Iterator[None]:
    """Lets traces record the operators of this module whole."""
    with _whole_for_dynamo(), _whole_for_autograd():
        yield


@contextlib.contextmanager
def _whole_for_dynamo() -> Iterator[None]:
    """Switches off what Dynamo takes apart: sums with a factor."""
    handlers: Any = TorchInGraphFunctionVariable._get_handlers()  # noqa: SLF001 (no public switch)
    handler = handlers.pop(torch.addcdiv, None)
    patch: Any = dynamo_config.patch(enable_dynamo_decompositions=False)
    try:
        with patch:
            yield
    finally:
        if handler is not None:
            handlers[torch.addcdiv] = handler


@contextlib.contextmanager
def _whole_for_autograd() -> Iterator[None]:
    """Switches off what autograd takes apart."""
    before = {op: {key: op.py_kernels.pop(key, None) for key in _KEYS} for op in REPLACED}
    for op, replacement in REPLACED.items():
        if replacement is not None:
            op.py_kernels.update(dict.fromkeys(_KEYS, replacement))
        _forget_dispatch(op)
    try:
        yield
    finally:
        for op, kernels in before.items():
            for key, kernel in kernels.items():
                op.py_kernels.pop(key, None)
                if kernel is not None:
                    op.py_kernels[key] = kernel
            _forget_dispatch(op)


def _forget_dispatch(op: Any) -> None:
    """Lets an operator look its kernels up again."""
    op._dispatch_cache.clear()  # noqa: SLF001 (no public name)
