"""Graphs of a step take faster forms of their operators where the step rises higher elsewhere, and no higher then."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break
from torch.profiler import profile

import fxhybrid
from fxhybrid import HybridModule
from fxhybrid.segments.segmented_step import STRAIGHT

N_STAGES = 4
IMAGES = torch.randn(8, 12, 32, 32, generator=torch.Generator().manual_seed(0))


class Stages(nn.Module):
    """Stages of convolution, batch norm and ReLU, with breaks between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()) for _ in range(N_STAGES)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images."""
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < N_STAGES - 1:
                graph_break()
        return x.mean((2, 3))


def calls(hybrid: HybridModule) -> Counter[str]:
    """Counts the operators of a step, when no copies are kept any more to begin it again."""
    for _ in range(STRAIGHT):
        hybrid(IMAGES).backward()
        hybrid.zero_grad()
    with profile() as profiled:
        hybrid(IMAGES).backward()
    hybrid.zero_grad()
    return Counter({event.key: event.count for event in profiled.key_averages()})


def test_only_the_graph_that_holds_the_peak_has_operators_in_slower_forms() -> None:
    hybrid = fxhybrid.compile(
        Stages(),
        budget=1.0,
        example_inputs=(IMAGES,),
        loss_fn=lambda output: F.cross_entropy(output, torch.arange(8)),
        compression="lossless",
    )
    made = calls(hybrid)
    assert len(hybrid.report().parts) == N_STAGES + 1
    # each graph holds the peak of its own halves at these operators, one graph that of the step
    assert made["aten::relu_"] >= N_STAGES - 1
    assert made["fxhybrid::batch_norm_backward"] <= 1
    assert made["aten::native_batch_norm_backward"] >= N_STAGES - 1

    def step() -> None:
        hybrid(IMAGES).backward()
        hybrid.zero_grad()

    measured = fxhybrid.measure_step(step, modules=hybrid, tensors=IMAGES, repeats=0).peak_bytes
    assert measured == hybrid.plan.peak_bytes
