"""Checks of the gradient error during training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError, HybridModule, InvalidArgument
from fxhybrid.ir.plan import Action, Compress


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(16, 3, 16, 16), torch.randint(10, (16,))


def compiled(**options: Any) -> HybridModule:
    """Four convolutions, whose smallest plan is a lossy one."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 256, 10))
    x, y = batch(1)
    call = {"example_inputs": (x,), "loss_fn": F.cross_entropy, "loss_args": (y,), "solver": "mps"}
    return fxhybrid.compile(model, **call, **options)


def smallest(**options: Any) -> HybridModule:
    """With a budget 10 % above the smallest peak."""
    with pytest.raises(BudgetError) as caught:
        compiled(budget=1, **options)
    return compiled(budget=int(1.1 * caught.value.minimum_bytes), **options)


def train(hybrid: HybridModule, steps: int) -> None:
    for step in range(steps):
        hybrid.zero_grad()
        x, y = batch(step)
        hybrid(x, loss_args=(y,)).backward()


def test_a_plan_within_the_limit_stays() -> None:
    hybrid = smallest(check_error_every=3)
    before = hybrid.plan
    train(hybrid, 7)
    checks = hybrid.report().drift_checks
    assert [check.step for check in checks] == [3, 6]
    assert all(check.error is not None and 0 < check.error <= 0.1 for check in checks)
    assert not any(check.replanned for check in checks)
    assert hybrid.plan == before
    assert "gradient error checked 2 times, re-planned 0 times" in str(hybrid.report()).replace("\n", " ")


def test_a_plan_above_the_limit_is_made_anew() -> None:
    """A channel that grows a thousand times between two checks takes the error above the limit."""
    inputs_of_norms = (f"convolution.default.{n}" for n in range(4))
    actions: dict[str, Action] = {name: Compress("rowwise4:256") for name in inputs_of_norms}
    plan = dataclasses.replace(compiled(budget=1.0).plan, actions=actions)  # a solver's follows measured times
    first = compiled(budget=1.0, plan=plan, max_grad_error=0.9).plan.gradient_error.value
    hybrid = compiled(budget=1.0, plan=plan, max_grad_error=1.5 * first, check_error_every=2)
    graph = hybrid.plan.graph_fingerprint
    with torch.no_grad():
        for norm in hybrid[1::3]:
            norm.weight[:1] *= 1000
    train(hybrid, 2)
    (check,) = hybrid.report().drift_checks
    assert check.error is not None
    assert check.error > 1.5 * first
    assert check.replanned
    x, y = batch(1)
    assert hybrid.check_error(x, loss_args=(y,)) <= 1.5 * first
    assert hybrid.plan.graph_fingerprint == graph


def test_what_lacked_memory_is_compared_with_eager_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as low:
        low.setattr("fxhybrid.accuracy.verifier.available_bytes", lambda: 0)
        hybrid = smallest()
    assert "not compared with eager" in str(hybrid.report()).replace("\n", " ")
    x, y = batch(1)
    hybrid.check_error(x, loss_args=(y,))
    assert "bit-equal to eager" in hybrid.report().signatures[0].capture_check


def test_nothing_is_checked_unless_asked_for() -> None:
    hybrid = smallest()
    train(hybrid, 3)
    assert hybrid.report().drift_checks == ()


@pytest.mark.parametrize("every", [0, -5, 1.5, True])
def test_bad_intervals_are_refused(every: Any) -> None:
    with pytest.raises(InvalidArgument, match="check_error_every"):
        fxhybrid.compile(nn.Linear(2, 2), budget=1.0, check_error_every=every)
