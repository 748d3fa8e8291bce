"""Finds out whether a tensor may be overwritten: nobody but the graph that runs can look at it any more."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fxhybrid.torch_internals import storage_use_count


def own_or_new(x: Tensor) -> Tensor:
    """Returns a tensor that dies with its caller's next operator, or a new one like it where anybody else holds it.

    Gradients come from autograd, and what they may be held by is not known before: hooks, ``retain_grad``, the other
    summand of an addition. References of Python, of C++ and to the storage are counted.
    """
    is_alone = _python_references(x) == _ALONE and _references(x) == _UNSHARED
    is_whole = x.untyped_storage().nbytes() == x.nbytes
    return x if is_alone and is_whole else torch.empty_like(x)


def _python_references(x: Tensor) -> int:
    return sys.getrefcount(x)


def _references(x: Tensor) -> tuple[int, int]:
    in_cpp: int = x._use_count()  # type: ignore[attr-defined]  # noqa: SLF001 (no public name)
    return in_cpp, int(storage_use_count(x.untyped_storage()._cdata))


def _counts_of_one_that_is_alone() -> tuple[int, tuple[int, int]]:
    x = torch.empty(1)

    def as_called(x: Tensor) -> tuple[int, tuple[int, int]]:
        return _python_references(x), _references(x)

    return as_called(x)


_ALONE, _UNSHARED = _counts_of_one_that_is_alone()
