"""A small model around any function, and the check that its planned step is eager's bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxhybrid.capture.step import StepCall
from fxhybrid.pipeline import prepare
from fxhybrid.profiling.op_profiler import Profile
from tests.compare import same_at_both_budgets, tensors_of, twins

N = 16


class Head(nn.Module):
    """A linear layer, a norm over its columns, and any function of what it gives."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.function(self.linear(x), *self.layers, *args)


def total(output: Any, *, every: bool = True) -> Tensor:
    """A scalar of all outputs, or of the first alone."""
    tensors = [t for t in tensors_of(output) if t.requires_grad]
    return torch.stack([t.square().mean() for t in (tensors if every else tensors[:1])]).sum()


def check(model: nn.Module, *args: Any, every: tuple[bool, ...] = (True,)) -> None:
    """A step with all memory and one with the least, each bit-equal to eager.

    ``every`` says whether all outputs get a gradient, or the first alone: one step for each.
    """
    pair = twins(model)

    def step(m: nn.Module, all_outputs: bool) -> Any:
        m.zero_grad()
        output = m(*args)
        total(output, every=all_outputs).backward()
        return output

    def compare() -> None:
        for all_outputs in every:
            pair.same(partial(step, all_outputs=all_outputs))

    same_at_both_budgets(pair, compare)
    assert len(pair.hybrid.plans) == 1


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, N)), generator=torch.Generator().manual_seed(0))


def symmetric(h: Tensor) -> Tensor:
    return h.T @ h + torch.eye(N)


def captured_profile(model: nn.Module, *args: Any) -> Profile:
    """The profile of a model's step."""
    session = twins(model).hybrid._fxhybrid_session
    return prepare(session.step, StepCall(args, {}, ()), session.options).profile
