"""Batch norm with ``momentum=None``: running statistics weigh all batches alike, as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.compare import tighten, twins

NORMS: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: nn.BatchNorm2d(8, momentum=None),
    "plain": lambda: nn.BatchNorm2d(8, momentum=None, affine=False),
    "twice": lambda: nn.Sequential(*[nn.BatchNorm2d(8, momentum=None)] * 2),
    "without statistics": lambda: nn.BatchNorm2d(8, momentum=None, track_running_stats=False),
    "beside one with momentum": lambda: nn.Sequential(nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8)),
}


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NORMS)
def test_statistics_over_several_steps(name: str) -> None:
    """One plan for all counts, the same bits; evaluation between steps uses and keeps the statistics."""
    pair = twins(nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[name](), nn.ReLU()))

    def step(m: nn.Module, seed: int) -> Tensor:
        m.zero_grad()
        output: Tensor = m(images(seed))
        output.square().mean().backward()
        return output

    for seed in range(3):
        pair.same(lambda m, seed=seed: step(m, seed))
    tighten(pair.hybrid)
    pair.same(lambda m: step(m, 3))
    pair.same(lambda m: m.eval()(images(4)))
    pair.same(lambda m: step(m.train(), 5))
    assert len(pair.hybrid.plans) == 1


def test_low_precision() -> None:
    pair = twins(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)).bfloat16())
    pair.same(lambda m: m(images(0).bfloat16()).square().mean().backward())
    assert pair.hybrid.report().signatures[0].capture_check.startswith("bit-equal")
