"""Python floats that change from call to call become inputs of the graph: a new value is no new plan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxhybrid import measure_step
from tests.compare import Twins, tighten, twins

VALUES = (1.0, 0.9, 0.35, 0.7)


class Annealed(nn.Module):
    """Mixes by a weight that is passed, at a temperature that is an attribute; drops at a rate that is one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
        self.temperature, self.rate = 1.0, 0.5

    def forward(self, x: Tensor, weight: float = 0.5) -> Tensor:
        h = F.dropout(F.gumbel_softmax(self.first(x), tau=self.temperature), self.rate)
        out: Tensor = self.second(weight * h + (1 - weight) * h.flip(0) ** 2)
        return out


def rows() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, weight: float = 0.5) -> Tensor:
    model.zero_grad()
    out: Tensor = model(rows(), weight)
    out.square().mean().backward()
    return out


def same_at(pair: Twins, temperature: float, weight: float = 0.5, rate: float = 0.5) -> None:
    for model in (pair.plain, pair.hybrid):
        model.temperature, model.rate = temperature, rate  # type: ignore[assignment]
    pair.same(lambda m: step(m, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attributes_and_arguments_that_change(dtype: torch.dtype) -> None:
    """The second value of each is planned once more; with it, all others are."""

    class Cast(Annealed):
        def forward(self, x: Tensor, weight: float = 0.5) -> Tensor:
            return super().forward(x.to(dtype), weight)

    pair = twins(Cast().to(dtype), budget="1MiB")
    for value in VALUES:
        same_at(pair, value)
    assert len(pair.hybrid.plans) == 2
    for value in VALUES:
        same_at(pair, 0.2, value)
    assert len(pair.hybrid.plans) == 3
    budget = tighten(pair.hybrid)
    for value in VALUES:
        same_at(pair, value, 1 - value)
        measured = measure_step(lambda v=value: (step(pair.hybrid, v), pair.hybrid.zero_grad()), modules=pair.hybrid)
        assert measured.peak_bytes <= budget + rows().nbytes  # each call creates its input
    assert len(pair.hybrid.plans) == 3


def test_rates_of_dropout_stay_constants() -> None:
    """No operator takes a tensor as its rate; each value has a plan of its own."""
    pair = twins(Annealed(), budget="1MiB")
    for rate in (0.5, 0.2, 0.3):
        same_at(pair, 1.0, rate=rate)
    assert len(pair.hybrid.plans) == 3


def test_branches_on_a_float() -> None:
    """A plan holds for the values that take its branch."""

    class Branching(Annealed):
        def forward(self, x: Tensor, weight: float = 0.5) -> Tensor:
            h = self.second(self.first(x) * self.temperature)
            return h.exp() if self.temperature > 0.5 else h.sin()

    pair = twins(Branching(), budget="1MiB")
    for value in VALUES * 2:
        same_at(pair, value)
    assert len(pair.hybrid.plans) <= 3
