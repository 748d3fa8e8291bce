"""Steps an optimizer one parameter at a time, as each gradient is made.

An optimizer that treats every parameter by itself gives the same bits that way. Whether it does is tried out: a
stand-in steps as a whole, another one parameter by parameter, and all of their parameters and states are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.profiling.allocator import memory_rises
from fxhybrid.profiling.optimizer_step import stand_in, state_tensors

TRIED_STEPS, TRIED_ALIKE = 3, 3  # steps of the trial, and parameters of one group, type and number of dimensions in it
TRIED_ELEMENTS = 1 << 16  # of all parameters in the trial, about
NOT_ALONE = (
    "step_in_backward=True needs an optimizer that updates each parameter by its own gradient alone; {name} gives "
    "other {what} that way than by one step over all parameters, as it would with a norm of all gradients. Leave "
    "step_in_backward out, or take another optimizer"
)
NOT_TRIED = "step_in_backward=True cannot be tried with {name}: {error}. Leave step_in_backward out"


@dataclass(frozen=True, eq=False)
class ParameterUpdates:
    """Updates parameters in the backward pass.

    Attributes:
        optimizer: whose parameters they are.
        rise_bytes: how far memory rises within the update of each parameter, by position of the graph's input.
    """

    optimizer: torch.optim.Optimizer
    rise_bytes: Mapping[int, int]

    def takers(self, parameters: Mapping[int, Tensor]) -> dict[int, Callable[[Tensor], None]]:
        """Returns, by position, what updates each parameter by its gradient; groups are read as they are now."""
        twin, groups = _without_hooks(self.optimizer), _groups(self.optimizer)
        return {i: partial(_update, twin, groups[p], p) for i, p in parameters.items() if p in groups}


def updates_of(optimizer: torch.optim.Optimizer, parameters: Mapping[int, nn.Parameter]) -> ParameterUpdates:
    """Returns what updates parameters, given by position, in the backward pass; those of no optimizer are left out.

    Raises:
        InvalidArgument: the optimizer does not treat each parameter by itself.
    """
    groups = _groups(optimizer)
    if optimizer not in _RISES:
        _try(optimizer)
        _RISES[optimizer] = {}
    known = _RISES[optimizer]
    rises = {}
    for i, p in parameters.items():
        if p in groups:
            key = (id(groups[p]), p.shape, p.stride(), p.dtype, p.device)
            if key not in known:
                known[key] = _rise_bytes(optimizer, p)
            rises[i] = known[key]
    return ParameterUpdates(optimizer, rises)


_RISES: WeakKeyDictionary[torch.optim.Optimizer, dict[object, int]] = WeakKeyDictionary()


def _groups(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def _without_hooks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the same optimizer, which shares state with the given one, but runs no hooks."""
    twin = object.__new__(type(optimizer))
    hooks: dict[str, Any] = {
        name: {} for name in vars(optimizer) if name.startswith("_optimizer_") and name.endswith("_hooks")
    }
    twin.__dict__ = {**vars(optimizer), **hooks}
    return twin


def _update(twin: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient
    twin.param_groups = [{**group, "params": [parameter]}]
    try:
        type(twin).step(twin)
    finally:
        parameter.grad = None


def _try(optimizer: torch.optim.Optimizer) -> None:
    """Compares steps over all parameters with steps over one at a time, on small parameters."""
    name, chosen = type(optimizer).__name__, _chosen(optimizer)
    part = 1 + sum(p.numel() for p in chosen) // TRIED_ELEMENTS
    whole, split = (stand_in(optimizer, part, chosen) for _ in range(2))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    try:
        for step in range(TRIED_STEPS):
            for (_, stand_ins), generator in zip((whole, split), generators, strict=True):
                for p in stand_ins.values():
                    if step == 0:
                        _fill(p.data, generator)
                    _fill(p.grad, generator)
            type(optimizer).step(whole[0])
            takers = ParameterUpdates(split[0], {}).takers(dict(enumerate(split[1].values())))
            for p, taker in zip(split[1].values(), takers.values(), strict=True):
                gradient = p.grad
                assert gradient is not None
                taker(gradient)
                p.grad = gradient
    except Exception as error:  # an optimizer of the user's may raise anything
        raise InvalidArgument(NOT_TRIED.format(name=name, error=error)) from error
    for what, found in (("parameters", _values), ("states", _states)):
        pairs = zip(found(*whole), found(*split), strict=False)
        if len(found(*whole)) != len(found(*split)) or not all(torch.equal(a, b) for a, b in pairs):
            raise InvalidArgument(NOT_ALONE.format(name=name, what=what))


def _chosen(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Chooses trained parameters of each kind."""
    counts: Counter[object] = Counter()
    chosen = []
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            kind = number, p.dim(), p.dtype
            if p.requires_grad and counts[kind] < TRIED_ALIKE:
                counts[kind] += 1
                chosen.append(p)
    return chosen


def _fill(tensor: Tensor | None, generator: torch.Generator) -> None:
    assert tensor is not None, "stand-ins have gradients"
    tensor.copy_(torch.randn(tensor.shape, generator=generator))


def _values(_: torch.optim.Optimizer, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> list[Tensor]:
    return [p.detach() for p in stand_ins.values()]


def _states(twin: torch.optim.Optimizer, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> list[Tensor]:
    return state_tensors(twin, stand_ins.values())


def _rise_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    """Measures how far memory rises above parameter, gradient and complete state while one parameter is updated."""
    twin, stand_ins = stand_in(optimizer, 1, [parameter])
    ((group, (p,)),) = ((g, g["params"]) for g in twin.param_groups if g["params"])
    gradient = p.grad
    runs = [partial(_update, _without_hooks(twin), group, p, gradient) for _ in range(2)]
    first, second = memory_rises(runs, device=parameter.device)
    del stand_ins
    return max(second.peak_rise_bytes, first.peak_rise_bytes - first.retained_bytes)
