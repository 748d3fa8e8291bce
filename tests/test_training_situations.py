"""Training steps that are more than one call of one graph: matching, adversaries, routing by values."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fxhybrid import BudgetError
from tests.compare import assert_same, state_of, tighten, twins
from tests.pending_parts import compiled, peak_bytes, settle

ROWS, WIDTH = 64, 32


def batch(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed))


def test_detection_with_hungarian_matching() -> None:
    match = pytest.importorskip("scipy.optimize").linear_sum_assignment

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(*(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.GELU()))
            self.boxes = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            boxes = self.boxes(self.body(x))
            rows, columns = match(torch.cdist(boxes.detach(), targets).numpy())
            return (boxes[torch.as_tensor(rows)] - targets[torch.as_tensor(columns)]).abs().mean()

    args = batch(1), batch(2, 4)[:24]
    pair = twins(Detector(), example_inputs=args)

    def step(model: nn.Module) -> Tensor:
        model.zero_grad()
        loss: Tensor = model(*args)
        loss.backward()
        return loss.detach()

    pair.same(step)
    budget = tighten(pair.hybrid)
    pair.same(step)
    assert peak_bytes(lambda: step(pair.hybrid), [pair.hybrid], list(args)) <= budget


class Critic(nn.Module):
    """Scores samples; with real ones beside them, its own loss with a penalty on the slope between the two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, 1))

    def forward(self, made: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            return -self.net(made).mean()
        between = ((made + real) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(self.net(between).sum(), between, create_graph=True)
        return self.net(made).mean() - self.net(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def test_adversaries_with_a_gradient_penalty() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), Critic()])
    noise, real = batch(1, 8), batch(2)
    generator = compiled(copy.deepcopy(plain[0]), noise)
    critic = compiled(copy.deepcopy(plain[1]), real)

    def criticise(generator: nn.Module, critic: nn.Module) -> None:
        critic.zero_grad()
        with torch.no_grad():
            made = generator(noise)
        critic(made, real).backward()

    def persuade(generator: nn.Module, critic: nn.Module) -> None:
        for model in (generator, critic):
            model.zero_grad()
        critic(generator(noise)).backward()

    models, hybrids = tuple(plain), (generator, critic)
    for step, busy, x in ((criticise, [critic], real), (persuade, [generator, critic], noise)):
        settle(partial(step, *hybrids), busy)
        step(*models)
        for model, hybrid in zip(models, hybrids, strict=True):
            assert_same(state_of(model), state_of(hybrid))
        budget = max(hybrid.plan.budget_bytes for hybrid in busy)
        assert peak_bytes(partial(step, *hybrids), busy, [x]) <= budget


def test_experts_that_are_chosen_by_values() -> None:
    """How many rows an expert gets, and whether it runs at all, differs from batch to batch."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate = nn.Linear(WIDTH, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.gate(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero().squeeze(1)
                if len(rows) > 0:
                    out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
            return out.square().mean()

    pair = twins(Experts(), example_inputs=(batch(0),))

    def step(model: nn.Module, x: Tensor) -> Tensor:
        model.zero_grad()
        loss: Tensor = model(x)
        loss.backward()
        return loss.detach()

    budget = pair.hybrid.plan.budget_bytes
    peaks = []
    for seed in range(1, 4):
        x = batch(seed)
        with contextlib.suppress(BudgetError):  # of steps that take more than the first one
            peaks.append(peak_bytes(lambda x=x: step(pair.hybrid, x), [pair.hybrid], [x]))
            pair.same(lambda model, x=x: step(model, x))
    assert peaks
    assert max(peaks) <= budget
