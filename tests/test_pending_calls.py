"""Several calls before one backward pass: together they stay within the budget, or an error says so before the run."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError
from fxhybrid.compiler.pending_calls import pending_calls
from tests.compare import assert_same, state_of
from tests.pending_parts import ROWS, Encoder, batches, compiled, joint_loss, mlp, peak_bytes, settle

pytestmark = pytest.mark.usefixtures("nothing_pending")


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_calls_of_one_module_fit_together(n: int, share: float) -> None:
    inputs = batches(n)
    plain = mlp()
    hybrid = compiled(copy.deepcopy(plain), inputs[0], share)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        joint_loss(model, inputs).backward()

    settle(lambda: step(hybrid), [hybrid])
    step(plain)
    assert_same(state_of(plain), state_of(hybrid))
    assert peak_bytes(lambda: step(hybrid), [hybrid], inputs) <= hybrid.plan.budget_bytes


def test_gradients_that_accumulate_count_too() -> None:
    inputs = batches(2)
    plain = mlp()
    hybrid = compiled(copy.deepcopy(plain), inputs[0])
    for model in (plain, hybrid):
        joint_loss(model, inputs[:1]).backward()
    settle(lambda: joint_loss(hybrid, inputs).backward(), [hybrid])
    joint_loss(plain, inputs).backward()
    assert_same(state_of(plain), state_of(hybrid))
    assert peak_bytes(lambda: joint_loss(hybrid, inputs).backward(), [hybrid], inputs) <= hybrid.plan.budget_bytes


@pytest.mark.parametrize("reverse", [False, True])
def test_backward_passes_in_any_order(reverse: bool) -> None:
    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0])

    def step() -> None:
        hybrid.zero_grad()
        losses = [hybrid(x).square().mean() for x in inputs]
        for loss in losses[::-1] if reverse else losses:
            loss.backward()

    settle(step, [hybrid])
    assert peak_bytes(step, [hybrid], inputs) <= hybrid.plan.budget_bytes


def test_a_chain_of_two_modules() -> None:
    (x,) = batches(1)
    plain = nn.ModuleList([nn.Sequential(*list(mlp())[:6]), mlp()])
    first, second = (compiled(copy.deepcopy(m), x) for m in plain)

    def step(one: nn.Module, two: nn.Module) -> None:
        one.zero_grad()
        two.zero_grad()
        two(one(x)).square().mean().backward()

    settle(lambda: step(first, second), [first, second])
    step(*plain)
    for model, hybrid in zip(plain, (first, second), strict=True):
        assert_same(state_of(model), state_of(hybrid))
    budget = max(first.plan.budget_bytes, second.plan.budget_bytes)
    assert peak_bytes(lambda: step(first, second), [first, second], [x]) <= budget


def contrast(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(a @ b.t(), torch.arange(len(a)))


def likeness(a: Tensor, b: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(a, b)).mean() + a.square().mean()


@pytest.mark.parametrize("loss", [likeness, contrast])
def test_siamese_batch_norm(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(16, 3, 12, 12) for _ in range(2)]
    hybrid = compiled(Encoder(), inputs[0])

    def step(model: nn.Module) -> None:
        model.zero_grad()
        loss(*(model(x) for x in inputs)).backward()

    settle(lambda: step(hybrid), [hybrid])
    plain = Encoder()
    plain.load_state_dict(hybrid.state_dict())  # a refused call was none, but the one before it moved the statistics
    for model in (plain, hybrid):
        step(model)
    assert_same(state_of(plain), state_of(hybrid))
    assert peak_bytes(lambda: step(hybrid), [hybrid], inputs) <= hybrid.plan.budget_bytes


def test_dropped_outputs_are_not_pending() -> None:
    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0])
    for _ in range(3):
        hybrid(inputs[0])
    kept = hybrid(inputs[0]).detach()
    assert not pending_calls()
    hybrid(inputs[1]).square().mean().backward()
    assert kept.shape == (ROWS, 8)


def test_a_broken_step_in_a_cycle_is_not_pending() -> None:
    (x,) = batches(1)
    hybrid = compiled(mlp(), x, "smallest")
    gc.disable()  # as between two automatic collections
    try:
        cycle: list[Any] = [hybrid(x)]  # what a caught exception does, whose frames hold it
        cycle.append(cycle)
        del cycle
        assert len(pending_calls()) == 1
        hybrid(x).sum().backward()  # its budget leaves no room for two
    finally:
        gc.enable()


def test_a_retained_graph_stays_pending() -> None:
    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0])
    loss = hybrid(inputs[0]).square().mean()
    loss.backward(retain_graph=True)
    assert len(pending_calls()) == 1
    with pytest.raises(BudgetError, match="1 earlier call"):
        hybrid(inputs[1])
    loss.backward()
    assert not pending_calls()
    hybrid.zero_grad()
    hybrid(inputs[1]).square().mean().backward()


def test_an_exception_between_calls() -> None:
    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0])

    def interrupted() -> None:
        output = hybrid(inputs[0])
        raise RuntimeError(f"after a call that gave {tuple(output.shape)}")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="after a call"):
            interrupted()
    gc.collect()
    assert not pending_calls()
    hybrid(inputs[1]).square().mean().backward()


def test_trial_runs_are_not_pending() -> None:
    inputs = batches(2)
    hybrid = fxhybrid.compile(mlp(), budget=0.6, example_inputs=(inputs[0],), solver="mps")
    assert not pending_calls()
    hybrid.check_error(inputs[1])
    assert not pending_calls()


def test_other_threads_have_steps_of_their_own() -> None:
    import threading

    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0])
    loss = hybrid(inputs[0]).square().mean()
    counts: list[int] = []

    def train() -> None:
        counts.append(len(pending_calls()))
        other = compiled(mlp(), inputs[1])
        other(inputs[1]).square().mean().backward()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert counts == [0]
    loss.backward()


def test_the_report_says_what_counts_of_a_loss_outside() -> None:
    (x,) = batches(1)
    outside = compiled(mlp(), x).report().signatures[0].loss
    # outputs of 256 x 8 floats: 8 KiB, and their gradients as much
    assert outside.startswith("computed outside")
    assert outside.count("8.0 KiB") == 2
    assert "loss_fn" in outside
    planned = fxhybrid.compile(
        mlp(), budget=1.0, example_inputs=(x,), loss_fn=F.cross_entropy, loss_args=(torch.zeros(ROWS).long(),)
    )
    assert planned.report().signatures[0].loss == "planned with the model"
