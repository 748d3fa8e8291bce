"""Counts the memory that planned signatures themselves hold: graphs, layouts, problems and plans."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from fxhybrid.compiler.signature import Signature
from fxhybrid.torch_internals import OpOverload, OpOverloadPacket

_SHARED = (type, ModuleType, OpOverload, OpOverloadPacket, torch.optim.Optimizer)
_LIBRARIES = ("sympy", "torch._dynamo", "torch._guards", "torch.fx.experimental")  # what all captures share


def held_bytes(signatures: Iterable[Signature]) -> int:
    """Counts the bytes of all Python objects that only the signatures hold, each once.

    The model, operators, functions' globals and what torch's tracers keep for all captures are left out, and so are
    C++ objects behind Python ones, of which fake tensors are the most.
    """
    total, seen, pending = 0, set[int](), list[Any](signatures)
    while pending:
        value = pending.pop()
        if id(value) in seen or _is_shared(value):
            continue
        seen.add(id(value))
        total += sys.getsizeof(value, 0)
        pending += gc.get_referents(value) if not isinstance(value, FunctionType) else value.__closure__ or ()
    return total


def _is_shared(value: Any) -> bool:
    if isinstance(value, _SHARED) or type(value).__module__.startswith(_LIBRARIES):
        return True
    if isinstance(value, nn.Module):
        return not isinstance(value, fx.GraphModule)
    return isinstance(value, dict) and "__builtins__" in value  # of a module
