"""Models and steps for several calls before one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import BudgetError, HybridModule

ROWS, WIDTH = 256, 64


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8))


class Encoder(nn.Module):
    """A batch-norm encoder, as siamese training calls it: running statistics move between the calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def compiled(model: nn.Module, x: Tensor, budget: Any = 1.0) -> HybridModule:
    return fxhybrid.compile(model, budget=budget, example_inputs=(x,), compression="lossless", solver="mps")


def batches(n: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(ROWS, WIDTH) for _ in range(n)]


def joint_loss(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    return torch.stack([model(x).square().mean() for x in inputs]).sum()


def settle(step: Callable[[], Any], modules: list[HybridModule]) -> int:
    """Repeats a step, with the budget raised as each error says, until it runs; returns the number of errors."""
    for errors in range(12):
        try:
            step()
        except BudgetError as error:
            if error.minimum_bytes > error.budget_bytes:
                for module in modules:
                    module.set_budget(max(error.minimum_bytes, module.plan.budget_bytes))
        else:
            return errors
    raise AssertionError("the ways out that the errors name lead nowhere")


def peak_bytes(step: Callable[[], Any], modules: list[Any], tensors: list[Tensor]) -> int:
    return fxhybrid.measure_step(step, modules=modules, tensors=tensors, repeats=0).peak_bytes
