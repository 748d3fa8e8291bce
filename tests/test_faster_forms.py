"""Batch norms run in ATen's own form where the peak has room for its workspace, and peaks stay as predicted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid.profiling.allocator import measure_step


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


WHOLE = torch.ops.aten.native_batch_norm_backward.default


@pytest.mark.parametrize("share", ["most", "smallest"])
def test_norms_use_the_room_that_there_is(share: str) -> None:
    torch.manual_seed(0)
    body = (layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *body), torch.randn(4, 3, 64, 64)
    plain = copy.deepcopy(model)
    budget = "smallest" if share == "smallest" else 1.0
    hybrid = fxhybrid.compile(model, budget=budget, example_inputs=(images,), loss_fn=loss_of, compression="off")
    targets = [node.target for node in hybrid.backward_graph.graph.nodes]
    assert WHOLE in targets  # the last ones of the backward pass run when most is gone

    def step() -> None:
        model.zero_grad()
        hybrid(images).backward()

    step()
    loss_of(plain(images)).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None)
    assert measure_step(step, modules=model, tensors=images, repeats=0).peak_bytes == hybrid.plan.peak_bytes
