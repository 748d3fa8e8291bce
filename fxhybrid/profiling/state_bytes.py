"""The bytes that a step cannot do without: parameters, gradients, optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sums the bytes of the distinct storages behind ``tensors``."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def gradient_bytes(model: nn.Module) -> int:
    """Returns the bytes of one full set of parameter gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Returns the bytes of the optimizer's state once it is complete.

    State that exists is counted; for parameters that have none yet, the optimizer takes one step on a
    one-element stand-in, and its state is scaled to the parameter.
    """
    if optimizer is None:
        return 0
    total = 0
    for group in optimizer.param_groups:
        per_element: Callable[[Tensor], int] | None = None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                total += storage_bytes(v for v in state.values() if isinstance(v, Tensor))
            elif parameter.requires_grad:
                per_element = per_element or _state_bytes(optimizer, group)
                total += per_element(parameter)
    return total


def _state_bytes(optimizer: torch.optim.Optimizer, group: dict[str, object]) -> Callable[[Tensor], int]:
    stand_in = nn.Parameter(torch.zeros(1, 1))
    stand_in.grad = torch.zeros(1, 1)
    twin = copy.copy(optimizer)
    twin.__dict__ = {**optimizer.__dict__, "param_groups": [{**group, "params": [stand_in]}]}
    twin.state = type(optimizer.state)(optimizer.state.default_factory)
    type(optimizer).step(twin)
    tensors = [v for v in twin.state[stand_in].values() if isinstance(v, Tensor)]
    shaped = sum(t.numel() == 1 and t.dim() > 0 for t in tensors)
    constant = sum(t.nbytes for t in tensors if t.dim() == 0)
    return lambda parameter: shaped * parameter.nbytes + constant
