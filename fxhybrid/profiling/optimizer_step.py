"""What an optimizer takes: the state that it keeps, and how far memory rises while it steps.

Both are measured on a stand-in: parameters and gradients of the same shapes, types and groups, and the same class of
optimizer, whichever implementation (for-loop, foreach, fused) it takes.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.profiling.allocator import memory_rises
from fxhybrid.profiling.state_bytes import storage_bytes
from fxhybrid.profiling.system_memory import available_bytes

COPIES = 8  # of the parameters that a stand-in may take: gradients, states and temporaries among them


@dataclass(frozen=True)
class OptimizerBytes:
    """Holds what an optimizer takes.

    Attributes:
        state_bytes: its state once it is complete.
        rise_bytes: how far memory rises within a step above parameters, gradients and complete state.
    """

    state_bytes: int
    rise_bytes: int


_MEASURED: WeakKeyDictionary[torch.optim.Optimizer, tuple[object, OptimizerBytes]] = WeakKeyDictionary()


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> OptimizerBytes:
    """Returns what an optimizer takes; measured when first asked, and again for other parameters.

    Raises:
        InvalidArgument: its step cannot be tried.
    """
    if optimizer is None:
        return OptimizerBytes(0, 0)
    trained = tuple(tuple(p.requires_grad for p in group["params"]) for group in optimizer.param_groups)
    known = _MEASURED.get(optimizer)
    if known is None or known[0] != trained:
        known = _MEASURED[optimizer] = trained, _measure(optimizer)
    return known[1]


def _measure(optimizer: torch.optim.Optimizer) -> OptimizerBytes:
    """Measures the state and the step of an optimizer; its own parameters and state are left alone.

    State that exists is counted as it is. Where free memory does not allow a stand-in of true size, one of smaller
    parameters is measured and scaled: both figures grow in proportion.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    existing = storage_bytes(state_tensors(optimizer, parameters))
    missing = {p for p in parameters if p.requires_grad and not optimizer.state.get(p)}
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return OptimizerBytes(existing, 0)
    room = available_bytes() if trained[0].device.type == "cpu" else torch.cuda.mem_get_info(trained[0].device)[0]
    part = max(1, math.ceil(COPIES * sum(p.nbytes for p in trained) / max(room, 1)))
    twin, stand_ins = stand_in(optimizer, part)
    try:
        first, second = memory_rises([lambda: _step(twin), lambda: _step(twin)], device=trained[0].device)
    except Exception as error:  # an optimizer of the user's may raise anything
        raise InvalidArgument(
            f"the step of optimizer={type(optimizer).__name__} cannot be tried on a stand-in: {error}; leave optimizer "
            "out, and count what it takes by reserve_bytes"
        ) from error
    new = storage_bytes(state_tensors(twin, [stand_ins[p] for p in missing]))
    rise_bytes = max(second.peak_rise_bytes, first.peak_rise_bytes - first.retained_bytes)
    return OptimizerBytes(existing + part * new, part * rise_bytes)


def _step(twin: torch.optim.Optimizer) -> None:
    type(twin).step(twin)


def stand_in(
    optimizer: torch.optim.Optimizer, part: int, chosen: Iterable[nn.Parameter] | None = None
) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, nn.Parameter]]:
    """Returns the same optimizer over other parameters, without state and hooks, and those parameters by its own.

    Args:
        optimizer: stays as it is.
        part: a parameter's first dimension is a ``part``-th of the true one.
        chosen: those of its parameters that are to be stood in for; None for all that are trained.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    stand_ins = {p: _like(p, part) for p in (trained if chosen is None else chosen)}
    twin = copy.copy(optimizer)
    groups: list[dict[str, Any]] = [
        {**group, "params": [stand_ins[p] for p in group["params"] if p in stand_ins]}
        for group in optimizer.param_groups
    ]
    names = [name for name in vars(optimizer) if name.startswith("_optimizer_") and name.endswith("_hooks")]
    hooks: dict[str, Any] = {name: OrderedDict() for name in names}
    twin.__dict__ = {**vars(optimizer), "param_groups": groups, **hooks}
    twin.state = type(optimizer.state)(optimizer.state.default_factory)
    return twin, stand_ins


def _like(parameter: nn.Parameter, part: int) -> nn.Parameter:
    shape = list(parameter.shape)
    if shape and part > 1:
        shape[0] = math.ceil(shape[0] / part)
    values = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    if shape == list(parameter.shape):
        values = torch.empty_strided(shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device).zero_()
    stand_in = nn.Parameter(values)
    stand_in.grad = torch.zeros_like(values)
    return stand_in


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Returns the tensors that an optimizer keeps for parameters."""
    states = (optimizer.state.get(p, {}) for p in parameters)
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
