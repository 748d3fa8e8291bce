"""Works unchanged, loop by loop: every bit as in eager over whole training loops at the smallest budget."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError, measure_step
from tests.compare import assert_same, state_of, tight_twins, tighten, total, twins
from tests.models import BatchNorms, mlp, rows


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 16, 16), torch.randint(10, (8,))


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("traced_loss", [False, True])
def test_ten_steps(built: str, traced_loss: bool) -> None:
    """Ten Adam steps at the smallest budget give eager's losses, weights and statistics, bit for bit."""
    x, y = images()
    model = BatchNorms().train()
    options: dict[str, Any] = {"loss_fn": F.cross_entropy, "loss_args": (y,)} if traced_loss else {}
    plain = copy.deepcopy(model)
    early = torch.optim.Adam(model.parameters(), 1e-2) if built == "before" else None
    hybrid = fxhybrid.compile(
        model,
        budget=1.0,
        example_inputs=(x,),
        solver="mps",
        compression="lossless",
        optimizer=early,
        **options,
    )
    tighten(hybrid)
    mine = early or torch.optim.Adam(hybrid.parameters(), 1e-2)
    theirs = torch.optim.Adam(plain.parameters(), 1e-2)
    for _ in range(10):
        mine.zero_grad()
        theirs.zero_grad()
        loss = hybrid(x, loss_args=(y,)) if traced_loss else F.cross_entropy(hybrid(x), y)
        expected = F.cross_entropy(plain(x), y)
        for optimizer, value in ((mine, loss), (theirs, expected)):
            value.backward()
            optimizer.step()
        assert torch.equal(loss, expected)
    assert_same(state_of(plain), state_of(hybrid))
    assert len(hybrid.plans) == 1


def test_optimizer_state_is_within_the_budget() -> None:
    x, y = images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    hybrid = fxhybrid.compile(
        model,
        budget=1.0,
        example_inputs=(x,),
        loss_fn=F.cross_entropy,
        loss_args=(y,),
        solver="mps",
        compression="lossless",
        optimizer=optimizer,
    )
    budget = tighten(hybrid)

    def step() -> None:
        optimizer.zero_grad()
        hybrid(x, loss_args=(y,)).backward()
        optimizer.step()

    found = measure_step(step, modules=hybrid, tensors=(x, y), optimizer=optimizer, repeats=0)
    assert found.peak_bytes <= budget
    assert found.stray_bytes == 0
    assert found.peak_bytes > 0.95 * budget


def test_accumulation_has_its_own_plan_and_keeps_the_budget() -> None:
    x, target = rows(), rows()
    model = mlp(0.2).train()
    pair = tight_twins(model, (x,), loss_fn=F.mse_loss, loss_args=(target,))
    hybrid = pair.hybrid
    hybrid(x, loss_args=(target,)).backward()
    with pytest.raises(BudgetError, match="earlier backward") as caught:
        hybrid(x, loss_args=(target,))
    budget = int(1.02 * caught.value.minimum_bytes)
    hybrid.zero_grad()
    hybrid.set_budget(budget)

    def steps(m: nn.Module) -> list[Tensor]:
        m.zero_grad()
        losses = []
        for _ in range(3):
            loss = m(x, loss_args=(target,)) if m is hybrid else F.mse_loss(m(x), target)
            loss.backward()
            losses.append(loss)
        return losses

    pair.same(steps)
    pair.same(steps, seed=3)

    def accumulate() -> None:
        hybrid(x, loss_args=(target,)).backward()

    found = measure_step(accumulate, modules=hybrid, tensors=(x, target), repeats=0)
    assert found.peak_bytes <= budget
    assert found.stray_bytes == 0


def test_zero_grad_habits() -> None:
    x = rows()
    pair = twins(mlp(0.1).train(), example_inputs=(x,))

    def keep_zeros(m: nn.Module) -> Tensor:
        m.zero_grad(set_to_none=False)
        total(out := m(x)).backward()
        return out

    def between(m: nn.Module) -> Tensor:
        out = m(x)
        m.zero_grad()
        total(out).backward()
        return out

    for _ in range(2):
        pair.same(keep_zeros)
        pair.same(between)
    tighten(pair.hybrid)
    for model in (pair.plain, pair.hybrid):
        model.zero_grad()
    pair.same(between)


def test_two_forwards_before_two_backwards() -> None:
    x, y = rows(), rows()
    pair = tight_twins(mlp(0.3).train(), (x,))
    with pytest.raises(BudgetError) as refused:  # the smallest budget of one call is none for two
        pair.hybrid(x), pair.hybrid(y)
    pair.hybrid.set_budget(refused.value.minimum_bytes)
    del refused

    def run(m: nn.Module) -> list[Tensor]:
        first, second = m(x), m(y)
        total(first).backward()
        m.zero_grad()
        total(second).backward()
        return [first, second]

    def one_backward(m: nn.Module) -> Tensor:
        out = m(m(x))
        m.zero_grad()
        total(out).backward()
        return out

    pair.same(run)
    for model in (pair.plain, pair.hybrid):
        model.zero_grad()
    pair.same(one_backward)


@pytest.mark.parametrize("whole_step", [False, True])
def test_autocast(whole_step: bool) -> None:
    """bfloat16 inside autocast, backward outside, as the AMP recipe has it."""
    x = torch.randn(8, 3, 16, 16)
    pair = twins(BatchNorms().train())

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
            loss = total(out)
            if whole_step:
                loss.backward()
        if not whole_step:
            loss.backward()
        return out

    assert pair.same(run).dtype is torch.bfloat16
    for model in (pair.plain, pair.hybrid):
        model.zero_grad()
    tighten(pair.hybrid)
    pair.same(run)

    def full_precision(m: nn.Module) -> Tensor:
        m.zero_grad()
        total(out := m(x)).backward()
        return out

    pair.hybrid.set_budget(1 << 30)
    assert pair.same(full_precision).dtype is torch.float32
    assert len(pair.hybrid.plans) == 2


def test_evaluation_between_steps() -> None:
    x, y = images()
    pair = tight_twins(BatchNorms().train(), (x,), loss_fn=F.cross_entropy, loss_args=(y,), return_outputs=True)

    def step(m: nn.Module) -> list[Tensor]:
        m.zero_grad()
        if m is pair.hybrid:
            loss, out = m(x, loss_args=(y,))
        else:
            out = m(x)
            loss = F.cross_entropy(out, y)
        loss.backward()
        return [loss, out]

    def evaluate(m: nn.Module) -> list[Tensor]:
        m.eval()
        plain = m(x)
        with torch.no_grad():
            fast = m(x)
        m.train()
        with torch.no_grad():
            training = m(x)
        with torch.inference_mode():
            inference = m(x).clone()
        return [plain, fast, training, inference]

    for _ in range(2):
        pair.same(step)
        pair.same(evaluate)
    pair.hybrid.eval()
    loss, out = pair.hybrid(x, loss_args=(y,))
    assert torch.equal(loss, F.cross_entropy(out, y))
    assert len(pair.hybrid.plans) == 1


def test_state_dict_and_copies() -> None:
    x = rows()
    pair = tight_twins(mlp(0.1).train(), (x,))

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        total(out := m(x)).backward()
        return out

    pair.same(run)
    assert list(pair.hybrid.state_dict()) == list(pair.plain.state_dict())
    saved = mlp().state_dict()
    for model in (pair.plain, pair.hybrid):
        model.load_state_dict(saved)
    pair.same(run)
    assert len(pair.hybrid.plans) == 1
    for twin in (copy.deepcopy(pair.hybrid), pickle.loads(pickle.dumps(pair.hybrid))):
        assert type(twin).__name__ == type(pair.hybrid).__name__
        twin.zero_grad()
        assert_same(state_of(pair.plain, pair.same(run)), state_of(twin, _at_seed(run, twin)))
        assert twin[0].weight is not pair.hybrid[0].weight


def _at_seed(run: Any, model: nn.Module) -> Any:
    torch.manual_seed(7)
    return run(model)


def test_loss_as_a_module_and_its_own_buffers() -> None:
    x, y = images()
    loss_fn = nn.CrossEntropyLoss(weight=torch.rand(10), label_smoothing=0.1)
    pair = tight_twins(BatchNorms().train(), (x,), loss_fn=loss_fn, loss_args=(y,))

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        loss = m(x, loss_args=(y,)) if m is pair.hybrid else loss_fn(m(x), y)
        loss.backward()
        return loss

    pair.same(run)
    assert not list(pair.hybrid.state_dict().keys() ^ pair.plain.state_dict().keys())
