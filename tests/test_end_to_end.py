"""The promise on real models: measured peaks under the budget, gradients right, sweeps monotone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import fxhybrid
from fxhybrid.accuracy.step_result import observe_step
from fxhybrid.capture.step import Step
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.suite import SuiteCase, load, names

QUICK = ("mobilenetv2", "bert")
REST = tuple(name for name in names() if name not in QUICK)
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
STEPS = 10


def eager_peak(case: SuiteCase) -> int:
    def step() -> None:
        case.model.zero_grad()
        case.loss().backward()

    peak = measure_step(step, modules=case.model, tensors=case.tensors, repeats=0).peak_bytes
    case.model.zero_grad()
    return peak


def call(hybrid: fxhybrid.HybridModule, case: SuiteCase) -> torch.Tensor:
    loss: torch.Tensor = hybrid(*case.inputs, loss_args=case.loss_args, **case.kwargs)
    return loss


def compiled(case: SuiteCase, budget: int, **options: object) -> fxhybrid.HybridModule:
    hybrid = fxhybrid.compile(case.model, budget=budget, loss_fn=case.loss_fn, **options)  # type: ignore[arg-type]
    call(hybrid, case).backward()
    case.model.zero_grad()
    return hybrid


def step_peak(hybrid: fxhybrid.HybridModule, case: SuiteCase) -> int:
    def step() -> None:
        hybrid.zero_grad()
        call(hybrid, case).backward()

    measured = measure_step(step, modules=hybrid, tensors=case.tensors, repeats=0)
    assert measured.stray_bytes == 0, "nothing may hide between steps"
    case.model.zero_grad()
    return measured.peak_bytes


@pytest.mark.parametrize("name", ALL)
def test_budgets_are_kept_and_a_sweep_is_monotone(name: str) -> None:
    case = load(name, "small")
    full = eager_peak(case)
    hybrid = compiled(case, full, solver="mps")
    minimum = hybrid.report().signatures[0].minimum_bytes
    optimizer = torch.optim.SGD(hybrid.parameters(), lr=1e-3)
    shares = [1.0 - 0.055 * i for i in range(12)]  # 1.0 down to 0.395 of the unmodified peak
    peaks, added = [], []
    for share in shares:
        if int(share * full) < minimum:
            with pytest.raises(fxhybrid.BudgetError):
                hybrid.set_budget(int(share * full))
            break
        hybrid.set_budget(int(share * full))
        for _ in range(STEPS if share == shares[-1] else 1):
            call(hybrid, case).backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(step_peak(hybrid, case))
        added.append(hybrid.plan.added_s)
        assert peaks[-1] <= int(share * full)
        assert abs(peaks[-1] - hybrid.plan.peak_bytes) <= 0.03 * peaks[-1]
    assert len(peaks) >= 4
    assert all(later <= earlier * 1.005 for earlier, later in pairwise(peaks))
    assert all(later >= earlier for earlier, later in pairwise(added))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("compression", ["lossless", "off"])
def test_exact_when_asked(name: str, compression: str) -> None:
    case = load(name, "small")
    step = Step(case.model, case.loss_fn, False)
    arguments = (case.inputs, case.kwargs, case.loss_args)
    eager = observe_step(lambda: step(*arguments), case.model, has_loss=True)
    with pytest.raises(fxhybrid.BudgetError) as caught:
        compiled(case, 1, compression=compression, solver="mps")
    tight = int(1.02 * caught.value.minimum_bytes)
    hybrid = fxhybrid.compile(case.model, budget=tight, loss_fn=case.loss_fn, compression=compression, solver="mps")
    found = observe_step(lambda: call(hybrid, case), case.model, has_loss=True)
    assert hybrid.plan.gradient_error.value == 0
    assert found.same_bits(eager)
    assert step_peak(hybrid, case) <= tight


@pytest.mark.parametrize("name", ALL)
def test_lossy_plans_stay_within_the_gradient_error(name: str) -> None:
    case = load(name, "small")
    with pytest.raises(fxhybrid.BudgetError) as caught:
        compiled(case, 1, solver="mps")
    hybrid = compiled(case, int(1.02 * caught.value.minimum_bytes), solver="mps")
    error = hybrid.plan.gradient_error
    assert error.source in ("measured", "exact")
    assert error.value <= 0.1
    found = hybrid.check_error(*case.inputs, loss_args=case.loss_args, **case.kwargs)
    assert found <= 0.1
