"""A model that takes several graphs, and its training step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import BudgetError, HybridModule

ROWS, WIDTH = 256, 32
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


class Blocks(nn.Module):
    """Six residual blocks; behind some of them Python looks at values."""

    def __init__(self, breaks: tuple[int, ...] = (0, 2, 4), drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(6)
        )
        self.breaks, self.drop = breaks, drop

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.drop and torch.rand([]) < self.drop:
                continue
            x = x + block(x)
            if i in self.breaks and not torch.isfinite(x).all():
                x = x.clamp(-1, 1)
        return x


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def step(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss = model(X) if isinstance(model, HybridModule) else loss_of(model(X))
    loss.backward()
    return loss.detach()


def peak_bytes(hybrid: HybridModule) -> int:
    return fxhybrid.measure_step(lambda: (step(hybrid), None)[1], modules=hybrid, tensors=X, repeats=0).peak_bytes


def smallest(hybrid: HybridModule) -> int:
    with pytest.raises(BudgetError) as caught:
        hybrid.set_budget(1)
    return caught.value.minimum_bytes
