"""The largest batch within a budget is found from a small one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxhybrid
from fxhybrid.errors import BudgetError, InvalidArgument

WIDTH = 32


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)))


def make_batch(samples: int) -> tuple[tuple[Tensor], tuple[Tensor]]:
    return (torch.zeros(samples, WIDTH),), (torch.zeros(samples, WIDTH),)


def largest(net: nn.Module, budget: fxhybrid.units.Budget) -> int:
    return fxhybrid.largest_batch(make_batch, net, budget, loss_fn=F.mse_loss, compression="off")


def compiled(net: nn.Module, budget: str, samples: int) -> fxhybrid.HybridModule:
    inputs, loss_args = make_batch(samples)
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "loss_args": loss_args, "compression": "off"}
    return fxhybrid.compile(net, budget=budget, example_inputs=inputs, **options)


def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    net, budget = model(), "256KiB"
    samples = largest(net, budget)
    hybrid, (inputs, loss_args) = compiled(net, budget, samples), make_batch(samples)

    def step() -> None:
        net.zero_grad()
        hybrid(*inputs, loss_args=loss_args).backward()

    found = fxhybrid.measure_step(step, modules=net, tensors=(inputs, loss_args), repeats=0)
    assert 0.98 * 2**18 < found.peak_bytes <= 2**18
    with pytest.raises(BudgetError):
        compiled(net, budget, samples + samples // 50)


def test_budgets_that_no_batch_or_any_batch_fits_are_refused() -> None:
    net = model()
    with pytest.raises(BudgetError):
        largest(net, sum(p.nbytes for p in net.parameters()))
    with pytest.raises(InvalidArgument, match="depends on the batch"):
        largest(net, 0.5)
