"""The budget covers the optimizer's step: its state, and what it takes while it steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxhybrid
from fxhybrid.errors import InvalidArgument
from fxhybrid.profiling.optimizer_step import optimizer_bytes

Parameters = list[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": torch.optim.Adam,
    "adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}


def model(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8))


@pytest.mark.parametrize("rows", [4, 4096], ids=["mostly parameters", "mostly activations"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_whole_iteration_peaks_as_predicted(name: str, rows: int) -> None:
    net, x = model(128), torch.randn(rows, 32)
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    hybrid = fxhybrid.compile(
        net,
        budget="smallest",
        example_inputs=(x,),
        loss_fn=lambda output: output.square().mean(),
        optimizer=optimizer,
        compression="off",
    )

    def iteration() -> None:
        optimizer.zero_grad()
        hybrid(x).backward()
        optimizer.step()

    found = fxhybrid.measure_step(iteration, modules=hybrid, tensors=x, optimizer=optimizer, repeats=0)
    predicted = hybrid.plan.peak_bytes
    # Python numbers that an operator here and there makes a tensor of take 12 bytes for a moment
    assert predicted - 64 <= found.peak_bytes <= hybrid.plan.budget_bytes


def test_state_and_rise_are_those_of_the_implementation() -> None:
    net = model(64)
    sizes = [p.nbytes for p in net.parameters()]
    total, largest = sum(sizes), max(sizes)
    loop, foreach, fused = (
        optimizer_bytes(torch.optim.Adam(net.parameters(), **how))
        for how in ({"foreach": False}, {"foreach": True}, {"fused": True})
    )
    # exp_avg and exp_avg_sq, and a count of 4 bytes for each of 6 parameters
    assert loop.state_bytes == foreach.state_bytes == fused.state_bytes == 2 * total + 6 * 4
    # the loop holds a denominator and its square root's input at once; foreach a denominator of every parameter
    assert 2 * largest <= loop.rise_bytes < 2 * largest + 2_500
    assert total <= foreach.rise_bytes < total + 100
    assert fused.rise_bytes < 100


def test_measuring_leaves_the_optimizer_alone() -> None:
    net = model(16)
    optimizer = torch.optim.Adam(net.parameters())
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer_bytes(optimizer)
    assert not calls
    assert not optimizer.state
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_a_step_that_cannot_be_tried_is_named() -> None:
    net = model(16)
    with pytest.raises(InvalidArgument, match=r"optimizer=LBFGS cannot be tried.*reserve_bytes"):
        fxhybrid.compile(
            net, budget=1.0, example_inputs=(torch.randn(4, 32),), optimizer=torch.optim.LBFGS(net.parameters())
        )
