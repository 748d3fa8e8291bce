"""Works unchanged, call by call: changing signatures, unusual backward passes, non-finite values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxhybrid import BackwardError
from fxhybrid.compiler import session
from tests.compare import tight_twins, total, twins
from tests.models import ROWS, mlp, rows


def test_twelve_shapes_and_a_smaller_last_batch() -> None:
    pair = twins(mlp(0.1, depth=1).train(), budget="1GiB")
    batches = [rows(n) for n in range(ROWS, ROWS + 12)] + [rows(5)]

    def run_on(x: Tensor) -> Any:
        def run(m: nn.Module) -> Tensor:
            m.zero_grad()
            total(out := m(x)).backward()
            return out

        return run

    for x in batches:
        pair.same(run_on(x))
    for x in batches:
        pair.same(run_on(x), seed=2)
    assert len(pair.hybrid.plans) == 13


class Counting(nn.Module):
    """Keeps a Python number that changes at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_a_python_counter_is_right_but_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MANY_SIGNATURES", 3)
    pair = twins(Counting().train(), budget="1GiB")
    x = torch.randn(8, 4)
    for _ in range(2):
        pair.same(lambda m: m(x))
    with pytest.warns(UserWarning, match="Python attribute"):
        pair.same(lambda m: m(x))
    pair.same(lambda m: m(x))
    assert pair.hybrid.calls == pair.plain.calls == 4


def test_dropout_rate_and_freezing_change_the_signature() -> None:
    x = rows()
    pair = twins(mlp(0.1).train())

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        total(out := m(x)).backward()
        return out

    pair.same(run)
    for model in (pair.plain, pair.hybrid):
        model[2].p = 0.8
    pair.same(run)
    for model in (pair.plain, pair.hybrid):
        model.zero_grad()
        model[0].requires_grad_(False)
    pair.same(run)
    assert pair.hybrid[0].weight.grad is None
    for model in (pair.plain, pair.hybrid):
        model[0].requires_grad_(True)
        model[2].p = 0.1
    pair.same(run)
    assert len(pair.hybrid.plans) == 3


def test_retain_graph_and_inputs_of_backward() -> None:
    x = rows().requires_grad_()
    pair = tight_twins(mlp(0.3).train(), (x,))

    def run(m: nn.Module) -> list[Tensor]:
        m.zero_grad()
        x.grad = None
        out = m(x)
        total(out).backward(retain_graph=True)
        total(out).backward()
        grads = [x.grad, *(p.grad for p in m.parameters())]
        m.zero_grad()
        again = torch.autograd.grad(total(m(x)), [x, m[0].weight])
        return [out, *again, *grads]

    pair.same(run)


def test_second_backward_without_retain_graph_is_an_error() -> None:
    x = rows()
    hybrid = tight_twins(mlp().train(), (x,)).hybrid
    loss = total(hybrid(x))
    loss.backward()
    with pytest.raises(RuntimeError, match=r"second time"):
        loss.backward()


def test_double_backward_is_refused_clearly() -> None:
    x = rows().requires_grad_()
    hybrid = tight_twins(mlp().train(), (x,)).hybrid
    with pytest.raises(BackwardError, match=r"create_graph=True"):
        torch.autograd.grad(total(hybrid(x)), [x], create_graph=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("compression", ["lossless", "auto"])
def test_non_finite_inputs(bad: float, compression: str) -> None:
    """What a gradient scaler looks for: a gradient is finite here where it is finite in eager."""
    x = torch.randn(8, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten()).train()
    pair = tight_twins(model, (x,), compression=compression, max_grad_error=0.5)
    spoilt = x.clone()
    spoilt[2, 1, 3, 3] = bad

    def finite(m: nn.Module) -> list[list[bool]]:
        m.zero_grad()
        total(m(spoilt)).backward()
        return [bool(p.grad.isfinite().all()) for p in m.parameters()]

    expected = finite(pair.plain)
    assert not all(expected)
    assert finite(pair.hybrid) == expected
