"""Graphs of a step that run forward again in its backward pass, so that what they hand on need not be kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import BackwardError, BudgetError, HybridModule
from tests.compare import MARGIN, twins
from tests.several_graphs_parts import WIDTH, X, loss_of, peak_bytes, smallest, step


class Row(nn.Module):
    """Eight layers, each one a graph of its own."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), between or nn.Identity())
            for _ in range(8)
        )
        self.changed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.look(x, i)
        return x

    @torch.compiler.disable
    def look(self, x: Tensor, i: int) -> None:
        """Is what Dynamo cannot see into; may change what a layer returned in place."""
        if i == self.changed:
            with torch.no_grad():
                x += 1


def made_again(hybrid: HybridModule) -> list[str]:
    """Returns what graphs hand on and the plan makes again."""
    return [name for name, action in hybrid.plan.actions.items() if "hand_on" in name and str(action) == "recompute"]


def compiled_pair(model: nn.Module, **options: Any) -> Any:
    return twins(model.train(), example_inputs=(X,), loss_fn=loss_of, **options)


def test_every_second_result_is_made_again() -> None:
    pair = compiled_pair(Row())
    hybrid = pair.hybrid
    least = smallest(hybrid)
    for share in (1.0, 0.6, 0.3, 0.0):
        hybrid.set_budget(int(MARGIN * least + share * (hybrid.report().signatures[0].save_all_bytes - least)))
        pair.same(step)
        assert peak_bytes(hybrid) <= hybrid.plan.budget_bytes
    # seven results go from graph to graph; the first is made from the batch, the third from the second, and so on; the
    # last one's backward half has nothing beside it but what is kept
    assert made_again(hybrid) == [f"{k}/hand_on.default.0" for k in (1, 3, 5)]
    assert peak_bytes(hybrid) == hybrid.plan.peak_bytes


def test_the_graph_may_be_kept_for_another_backward_pass() -> None:
    hybrid = compiled_pair(Row()).hybrid
    hybrid.set_budget(int(MARGIN * smallest(hybrid)))
    step(hybrid)
    once = [p.grad.clone() for p in hybrid.parameters()]
    hybrid.set_budget(1 << 24)  # room for a second set of gradients
    hybrid.set_budget(int(MARGIN * smallest(hybrid)) + 2 * sum(g.nbytes for g in once))
    hybrid.zero_grad()
    loss = hybrid(X)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(hybrid.parameters(), once, strict=True))


@pytest.mark.parametrize("between", [nn.Dropout(0.1), nn.BatchNorm1d(WIDTH)], ids=["random", "statistics"])
def test_graphs_that_must_run_once_do(between: nn.Module) -> None:
    pair = compiled_pair(Row(between))
    pair.hybrid.set_budget(int(MARGIN * smallest(pair.hybrid)))
    pair.same(step)
    assert not made_again(pair.hybrid)


def test_what_python_changes_between_graphs_is_kept() -> None:
    row = Row()
    row.changed = 2
    pair = compiled_pair(row)
    pair.hybrid.set_budget(int(MARGIN * smallest(pair.hybrid)))
    pair.same(step)
    assert "3/hand_on.default.0" not in made_again(pair.hybrid) != []


def test_python_may_begin_to_change_it_later() -> None:
    pair = compiled_pair(Row())
    for budget in (int(MARGIN * smallest(pair.hybrid)), 1 << 20):
        pair.hybrid.set_budget(budget)
        for changed in (None, 2, 0):
            pair.plain.changed = pair.hybrid.changed = changed
            try:
                pair.same(step)
            except BudgetError:  # its plan has made no room to keep it
                assert changed is not None


def test_a_bias_that_changes_before_the_backward_pass_is_noticed() -> None:
    """Autograd does not watch it: no backward half reads a bias."""
    hybrid = compiled_pair(Row()).hybrid
    hybrid.set_budget(int(MARGIN * smallest(hybrid)))
    loss = hybrid(X)
    with torch.no_grad():
        next(p for name, p in hybrid.named_parameters() if name.endswith("2.2.bias")).add_(1)
    with pytest.raises(BackwardError, match="changed in place"):
        loss.backward()
    loss = None
    fxhybrid.measure_step(lambda: (step(hybrid), None)[1], modules=hybrid, repeats=0)


def test_autocast_ends_before_the_backward_pass() -> None:
    x = torch.cat([X] * 16)
    pair = compiled_pair(Row(), budget="64MiB")

    def run(model: nn.Module) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x) if isinstance(model, HybridModule) else loss_of(model(x))
        loss.backward()
        return loss.detach()

    pair.same(run)
    pair.hybrid.set_budget(int(MARGIN * smallest(pair.hybrid)))
    pair.same(run)
    assert made_again(pair.hybrid)
