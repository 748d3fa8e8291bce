"""Models that checkpoint their own blocks the reentrant way, which refuses ``autograd.grad``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.compare import same_at_both_budgets, twins

N = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(N, N)
        self.block = nn.Sequential(nn.Linear(N, 2 * N), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * N, N))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (h + checkpoint(self.block, h, use_reentrant=True)).square().mean()  # type: ignore[no-any-return]


def test_a_step_is_eagers() -> None:
    pair = twins(Net())

    def step(m: nn.Module) -> Tensor:
        m.zero_grad()
        loss: Tensor = m(torch.ones(4, N))
        loss.backward()
        return loss

    same_at_both_budgets(pair, lambda: pair.same(step))


def test_trial_runs_leave_gradients_and_their_hooks_alone() -> None:
    model = Net()
    steps: list[nn.Parameter] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(steps.append)
    model.first.weight.grad = kept = torch.ones(N, N)
    pair = twins(model, example_inputs=(torch.ones(4, N),))
    assert not steps
    assert model.first.weight.grad is kept
    assert kept.equal(torch.ones(N, N))
    assert model.block[0].weight.grad is None
    model.zero_grad()
    pair.hybrid(torch.ones(4, N)).backward()
    assert len(steps) == len(list(model.parameters()))
