"""Budgets that people can say: shares in percent, what is free, the smallest; and what report() says of calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxhybrid
from fxhybrid.compiler.budgets import FREE_SHARE, FREE_SHARE_GLIBC, auto_bytes
from fxhybrid.errors import InvalidArgument
from fxhybrid.module import HybridModule
from fxhybrid.profiling.system_memory import available_bytes
from fxhybrid.units import NamedBudget, check_budget, check_size


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.GELU())))


def compiled(budget: fxhybrid.units.Budget, rows: int = 512) -> HybridModule:
    return fxhybrid.compile(model(), budget=budget, example_inputs=(torch.randn(rows, 64),))


def test_names_and_shares() -> None:
    assert check_budget("80%") == check_budget(" 80 % ") == 0.8
    assert check_budget("auto") is check_budget(NamedBudget.AUTO) is NamedBudget.AUTO
    assert check_budget("smallest") is NamedBudget.SMALLEST
    for bad in ("0%", "101%", "nan%", "x%", "%", "least"):
        with pytest.raises(InvalidArgument, match='"auto" for what is free now, or "smallest"'):
            check_budget(bad)
    with pytest.raises(InvalidArgument, match="give bytes"):
        check_size("smallest")  # a sweep over budgets has no use for names


def test_a_share_in_percent_is_the_share() -> None:
    assert compiled("70%").plan.budget_bytes == compiled(0.7).plan.budget_bytes


def test_the_smallest_budget_is_kept_and_cannot_be_undercut() -> None:
    x = torch.randn(512, 64)
    hybrid = compiled("smallest")
    plan = hybrid.plan
    assert plan.peak_bytes == plan.budget_bytes < compiled(1.0).plan.peak_bytes

    def step() -> None:
        hybrid.zero_grad()
        hybrid(x).sum().backward()

    measured = fxhybrid.measure_step(step, modules=(hybrid,), tensors=(x,))
    assert measured.peak_bytes <= plan.budget_bytes
    with pytest.raises(fxhybrid.BudgetError) as refused:
        hybrid.set_budget(plan.budget_bytes - 1)
    assert refused.value.minimum_bytes == plan.budget_bytes
    again = compiled(1.0)
    again.set_budget("smallest")
    assert again.plan.budget_bytes == plan.budget_bytes


def test_auto_is_what_is_held_and_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(p.nbytes for p in model().parameters())
    for threshold, share in (("131072", FREE_SHARE), (None, FREE_SHARE_GLIBC)):
        if threshold is None:
            monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
        else:
            monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", threshold)
        # other processes take and give back memory meanwhile
        assert auto_bytes(model(), None) == pytest.approx(parameters + share * available_bytes(), rel=0.2)
    assert compiled("auto").plan.counts() == {}  # nothing to save where gigabytes are free


def test_names_need_a_first_call() -> None:
    hybrid = fxhybrid.compile(model(), budget=1.0)
    with pytest.raises(InvalidArgument, match="needs a first call"):
        hybrid.set_budget("smallest")


def test_report_before_a_call_and_of_many_calls() -> None:
    hybrid = fxhybrid.compile(model(), budget="64MiB", compression="off")
    assert "nothing is planned yet" in str(hybrid.report())
    for rows in (8, 16, 24, 32):
        hybrid(torch.randn(rows, 64)).sum().backward()
    lines = str(hybrid.report()).splitlines()
    for number, rows in enumerate((32, 24, 16, 8), 1):
        assert any(f"call {number}" in line and f"({rows}, 64)" in line for line in lines)
