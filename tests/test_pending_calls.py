"""Several calls before one backward pass: together they stay within the budget, or an error says so before the run."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError, HybridModule
from fxhybrid.compiler.pending_calls import pending_calls
from fxhybrid.errors import BackwardError
from tests.compare import assert_same, state_of

ROWS, WIDTH = 256, 64


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    gc.collect()
    assert not pending_calls()
    yield
    gc.collect()
    assert not pending_calls(), "a call is entered although its graph is gone"


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8))


class Encoder(nn.Module):
    """A batch-norm encoder, as siamese training calls it: running statistics move between the calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def compiled(model: nn.Module, x: Tensor, budget: Any = 1.0) -> HybridModule:
    return fxhybrid.compile(model, budget=budget, example_inputs=(x,), compression="lossless", solver="mps")


def batches(n: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(ROWS, WIDTH) for _ in range(n)]


def joint_loss(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    return torch.stack([model(x).square().mean() for x in inputs]).sum()


def settle(step: Callable[[], Any], modules: list[HybridModule]) -> int:
    """Repeats a step, with the budget raised as each error says, until it runs; returns the number of errors."""
    for errors in range(12):
        try:
            step()
        except BudgetError as error:
            if error.minimum_bytes > error.budget_bytes:
                for module in modules:
                    module.set_budget(max(error.minimum_bytes, module.plan.budget_bytes))
        else:
            return errors
    raise AssertionError("the ways out that the errors name lead nowhere")


def peak_bytes(step: Callable[[], Any], modules: list[Any], tensors: list[Tensor]) -> int:
    return fxhybrid.measure_step(step, modules=modules, tensors=tensors, repeats=0).peak_bytes


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


def test_siamese_batch_norm() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(16, 3, 12, 12) for _ in range(2)]
    hybrid = compiled(Encoder(), inputs[0])

    def step(model: nn.Module) -> None:
        model.zero_grad()
        a, b = (model(x) for x in inputs)
        ((1 - F.cosine_similarity(a, b)).mean() + a.square().mean()).backward()

    settle(lambda: step(hybrid), [hybrid])
    plain = Encoder()
    plain.load_state_dict(hybrid.state_dict())  # a refused call was none, but the one before it moved the statistics
    for model in (plain, hybrid):
        step(model)
    assert_same(state_of(plain), state_of(hybrid))
    assert peak_bytes(lambda: step(hybrid), [hybrid], inputs) <= hybrid.plan.budget_bytes


def test_where_nothing_fits_the_call_is_refused() -> None:
    inputs = batches(2)
    plain = mlp()
    hybrid = compiled(copy.deepcopy(plain), inputs[0])
    try:
        hybrid.set_budget(1)
    except BudgetError as error:
        hybrid.set_budget(int(error.minimum_bytes * 1.02))
    generator = torch.get_rng_state()
    with pytest.raises(BudgetError, match="1 earlier call has not had a backward pass") as caught:
        joint_loss(hybrid, inputs)
    assert torch.equal(generator, torch.get_rng_state())
    assert caught.value.minimum_bytes > caught.value.budget_bytes
    assert str(caught.value.minimum_bytes) in str(caught.value)
    del caught
    for model in (plain, hybrid):  # one call a step is right as before
        joint_loss(model, inputs[:1]).backward()
    assert_same(state_of(plain), state_of(hybrid))


def test_ways_out_work() -> None:
    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0], 0.8)
    with pytest.raises(BudgetError, match="put the calls into one module") as caught:
        joint_loss(hybrid, inputs)
    needed = caught.value.minimum_bytes
    del caught
    # more budget
    hybrid.set_budget(needed)
    joint_loss(hybrid, inputs).backward()

    # one module
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = mlp()

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.encoder(a), self.encoder(b)

    both = fxhybrid.compile(Both(), budget=needed, example_inputs=tuple(inputs), compression="lossless", solver="mps")

    def step() -> None:
        both.zero_grad()
        a, b = both(*inputs)
        (a.square().mean() + b.square().mean()).backward()

    assert peak_bytes(step, [both], inputs) <= needed


@pytest.mark.parametrize(("n", "share"), [(2, 1.05), (3, 1.4)])
def test_a_first_step_makes_room_by_letting_go(n: int, share: float) -> None:
    """The first call was planned alone, and holds 512 KiB; what it can recompute makes room for the others."""
    inputs = batches(n)
    plain = mlp()
    hybrid = compiled(copy.deepcopy(plain), inputs[0])
    hybrid.set_budget(int(share * hybrid.plan.budget_bytes))
    joint_loss(hybrid, inputs).backward()  # nothing is known of later calls yet
    joint_loss(plain, inputs).backward()
    assert_same(state_of(plain), state_of(hybrid))
    fresh = compiled(mlp(), inputs[0])
    fresh.set_budget(hybrid.plan.budget_bytes)

    def step() -> None:
        fresh.zero_grad()
        joint_loss(fresh, inputs).backward()

    assert peak_bytes(step, [fresh], inputs) <= hybrid.plan.budget_bytes


def test_what_was_let_go_is_not_recomputed_from_changed_weights() -> None:
    inputs = batches(2)
    hybrid = compiled(mlp(), inputs[0])
    hybrid.set_budget(int(1.05 * hybrid.plan.budget_bytes))
    loss, later = (hybrid(x).square().mean() for x in inputs)
    del later
    with torch.no_grad():
        hybrid[0].weight.mul_(2)  # eager's backward pass does not read the first weight
    with pytest.raises(BackwardError, match="changed in place"):
        loss.backward()
    assert hybrid[0].weight.grad is None
    del loss
    joint_loss(hybrid, inputs).backward()


def test_the_same_step_fits_when_it_is_run_again() -> None:
    """The plan of one call needs 560,424 bytes; two fit into 588,445 by plans that hold less from the start."""
    torch.manual_seed(0)
    inputs = [torch.randn(16, 3, 12, 12) for _ in range(2)]
    hybrid = compiled(Encoder(), inputs[0])
    hybrid.set_budget(int(1.05 * hybrid.plan.budget_bytes))

    def step() -> None:
        hybrid.zero_grad()
        joint_loss(hybrid, inputs).backward()

    with pytest.raises(BudgetError, match="run the same step again") as caught:
        step()
    assert caught.value.minimum_bytes <= hybrid.plan.budget_bytes
    del caught
    step()
    assert peak_bytes(step, [hybrid], inputs) <= hybrid.plan.budget_bytes


@pytest.mark.parametrize("n", [2, 3])
def test_the_named_budget_is_enough(n: int) -> None:
    """Each error names a figure that holds for the calls so far, so there is one at most for each later call."""
    torch.manual_seed(0)
    inputs = [torch.randn(16, 3, 12, 12) for _ in range(n)]
    hybrid = compiled(Encoder(), inputs[0], 0.9)

    def step() -> None:
        hybrid.zero_grad()
        joint_loss(hybrid, inputs).backward()

    assert 1 <= settle(step, [hybrid]) < n
    assert peak_bytes(step, [hybrid], inputs) <= hybrid.plan.budget_bytes


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
