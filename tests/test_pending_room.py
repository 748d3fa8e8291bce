"""Room for several calls before one backward pass: refusals, ways out, and what earlier calls let go of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import BudgetError
from fxhybrid.errors import BackwardError
from tests.compare import assert_same, state_of
from tests.pending_parts import Encoder, batches, compiled, joint_loss, mlp, peak_bytes, settle

pytestmark = pytest.mark.usefixtures("nothing_pending")


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
    """The plan of one call needs 575,016 bytes; two fit into 661,268 by plans that hold less from the start.

    No convolutions: how much their kernels take depends on the processor.
    """
    inputs = batches(2)
    torch.manual_seed(5)
    layers = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    hybrid = compiled(nn.Sequential(*layers, nn.Linear(64, 6)), inputs[0])
    hybrid.set_budget(int(1.15 * hybrid.plan.budget_bytes))

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
