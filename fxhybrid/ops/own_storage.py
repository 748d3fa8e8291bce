"""Finds out whether a tensor may be overwritten: nobody but the graph that runs can look at it any more."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fxhybrid.torch_internals import storage_use_count


class Probe:
    """Is held by the graph that runs, in one variable, and by nobody else."""


def own_or_new(x: Tensor, probe: Probe) -> Tensor:
    """Returns a tensor that dies with its caller's next operator, or a new one like it where anybody else holds it.

    Gradients come from autograd, and what they may be held by is not known before: hooks, ``retain_grad``, the other
    summand of an addition. References of Python, of C++ and to the storage are counted. How many of Python's a call
    itself takes changes as the interpreter specializes code, so an object that came by the same call is counted, too.

    Args:
        x: a variable of the caller's.
        probe: another one.
    """
    is_alone = sys.getrefcount(x) == sys.getrefcount(probe) and _references(x) == _UNSHARED
    is_whole = x.untyped_storage().nbytes() == x.nbytes
    return x if is_alone and is_whole else torch.empty_like(x)


def _references(x: Tensor) -> tuple[int, int]:
    """Counts references of C++: to the tensor, and to its storage."""
    in_cpp: int = x._use_count()  # type: ignore[attr-defined]  # noqa: SLF001 (no public name)
    return in_cpp, int(storage_use_count(x.untyped_storage()._cdata))


_UNSHARED = _references(torch.empty(1))
