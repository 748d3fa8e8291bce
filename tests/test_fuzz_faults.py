"""Faults that random modules have found, one test for each kind."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from tests.compare import twins


class TwoLayouts(nn.Module):
    """The gradients of a view's readers lie in memory in different orders; their sum has that of one of them."""

    def __init__(self, readers: tuple[str, ...]) -> None:
        super().__init__()
        self.readers = readers
        self.trunk = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x).view(4, 6, 8)
        made = {"in order": lambda: h.exp(), "turned": lambda: h.transpose(0, 1).contiguous().sin()}
        return [made[name]() for name in self.readers]


@pytest.mark.parametrize("readers", list(permutations(("in order", "turned"))), ids=str)
@pytest.mark.parametrize("chosen", [0, 1])
def test_a_lone_summand_in_another_layout(readers: tuple[str, ...], chosen: int) -> None:
    pair = twins(TwoLayouts(readers))

    def step(model: nn.Module) -> list[Tensor]:
        outputs = model(torch.randn(24, 6))
        outputs[chosen].square().sum().backward()
        return outputs

    pair.same(step)
