"""Plans for the output gradients that arrive: a loss among the outputs, outputs that are dropped, and surprises."""

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
from fxhybrid import BudgetError, HybridModule, Plan
from fxhybrid.compiler.observed_backward import PATIENCE
from fxhybrid.compiler.pending_calls import pending_calls
from fxhybrid.errors import BackwardError
from tests.compare import MARGIN, assert_same, state_of

VOCABULARY, WIDTH, ROWS = 400, 16, 64


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    yield
    gc.collect()  # pytest keeps what it caught, and with it the frames of the step, in reference cycles
    assert not pending_calls()


class LanguageModel(nn.Module):
    """Returns loss and logits, as models of Hugging Face do; the logits are the largest tensor by far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.hidden = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(F.gelu(self.hidden(self.words(ids))))
        return {"logits": logits, "loss": F.cross_entropy(logits[:-1], ids[1:])}


IDS = torch.arange(ROWS) % VOCABULARY
LOGITS_BYTES = ROWS * VOCABULARY * 4


def compiled(model: nn.Module, budget: Any = 1.0, **options: Any) -> HybridModule:
    options = {"compression": "lossless", "solver": "mps", "example_inputs": (IDS,), **options}
    return fxhybrid.compile(model, budget=budget, **options)


def smallest(model: nn.Module, **options: Any) -> HybridModule:
    with pytest.raises(BudgetError) as caught:
        compiled(model, 1, **options)
    return compiled(model, int(MARGIN * caught.value.minimum_bytes), **options)


def drop(model: nn.Module) -> None:
    model.zero_grad()
    model(IDS)["loss"].backward()


def hold(model: nn.Module) -> None:
    model.zero_grad()
    output = model(IDS)
    output["loss"].backward()


def distill(model: nn.Module) -> None:
    model.zero_grad()
    output = model(IDS)
    (output["loss"] + output["logits"].square().mean()).backward()


def peak_bytes(step: Callable[[nn.Module], None], model: nn.Module) -> int:
    return fxhybrid.measure_step(lambda: step(model), modules=model, tensors=IDS, repeats=0).peak_bytes


@pytest.mark.parametrize("step", [drop, hold])
def test_the_loss_alone_is_planned(step: Callable[[nn.Module], None]) -> None:
    plain = LanguageModel()
    hybrid = compiled(copy.deepcopy(plain))
    for _ in range(2):
        for model in (plain, hybrid):
            step(model)
        assert_same(state_of(plain), state_of(hybrid))
    eager = peak_bytes(step, plain)
    assert peak_bytes(step, hybrid) == hybrid.plan.peak_bytes <= eager
    assert hybrid.plan.without_gradient == (0,)
    assert hybrid.plan.dropped == ((0,) if step is drop else ())


def test_the_smallest_plan_relies_on_dropped_outputs() -> None:
    plain = LanguageModel()
    hybrid = smallest(copy.deepcopy(plain))
    assert hybrid.plan.dropped == (0,)
    for model in (plain, hybrid):
        drop(model)
    assert_same(state_of(plain), state_of(hybrid))
    assert peak_bytes(drop, hybrid) == hybrid.plan.peak_bytes
    # with the logits held, the same plan would be above the budget by most of them
    assert hybrid.plan.budget_bytes - hybrid.plan.peak_bytes < LOGITS_BYTES
    hybrid.zero_grad()
    for _ in range(2):
        with pytest.raises(BudgetError, match="outputs 0 of the call"):
            hold(hybrid)
        assert all(p.grad is None for p in hybrid.parameters()), "refused before anything is touched"
    drop(hybrid)
    assert_same(state_of(plain), state_of(hybrid))


class Keeping(LanguageModel):
    """Leaves the logits in an attribute; the call returns the loss alone."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        output = super().forward(ids)
        self.logits = output.pop("logits").view(-1)
        return output


def test_the_smallest_plan_counts_what_the_model_keeps() -> None:
    plain = Keeping()
    hybrid = smallest(copy.deepcopy(plain))
    for _ in range(2):
        for model in (plain, hybrid):
            drop(model)
        assert_same(state_of(plain), state_of(hybrid))
    assert hybrid.plan.dropped == ()

    def step(model: nn.Module) -> None:
        drop(model)
        model.logits = None  # or those of the last call would be there when measuring begins, and gone at the peak

    assert peak_bytes(step, hybrid) == hybrid.plan.peak_bytes


def test_other_gradients_than_expected_are_right_at_once() -> None:
    plain = LanguageModel()
    hybrid = compiled(copy.deepcopy(plain), "8MiB")
    for _ in range(2):
        for model in (plain, hybrid):
            distill(model)
        assert_same(state_of(plain), state_of(hybrid))
    assert hybrid.plan.without_gradient == ()
    assert peak_bytes(distill, hybrid) <= hybrid.plan.budget_bytes
    for model in (plain, hybrid):
        drop(model)
    assert_same(state_of(plain), state_of(hybrid))


def test_other_gradients_than_expected_are_refused_where_nothing_gives_what_they_need() -> None:
    class Noisy(LanguageModel):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            output = super().forward(ids)
            return {**output, "noisy": F.dropout(output["logits"].detach() * self.head.bias, 0.3)}

    def both(model: nn.Module) -> None:
        torch.manual_seed(1)
        model.zero_grad()
        output = model(IDS)
        (output["loss"] + output["noisy"].square().mean()).backward()

    plain = Noisy()
    hybrid = compiled(copy.deepcopy(plain), "8MiB")
    with pytest.raises(BackwardError, match="zero the gradients and run the step again"):
        both(hybrid)  # the numbers that dropout drew are gone
    assert all(p.grad is None for p in hybrid.parameters())
    for model in (plain, hybrid):
        both(model)
    assert_same(state_of(plain), state_of(hybrid))


def test_what_never_gets_a_gradient_is_planned_away() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.trunk, self.one, self.two = nn.Linear(WIDTH, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.trunk(x)).sin()
            return self.one(h.cos()), self.two(torch.sigmoid(h)).exp()

    x = torch.randn(ROWS, WIDTH)
    plain = TwoHeads()
    hybrid = compiled(copy.deepcopy(plain), 0.96, example_inputs=(x,))
    assert hybrid.plan.actions, "a plan that adds no time has nothing to win"

    def first_alone(model: nn.Module) -> None:
        model.zero_grad()
        model(x)[0].square().sum().backward()

    for step in range(PATIENCE + 2):
        assert hybrid.plan.without_gradient == ((1,) if step > PATIENCE else ())
        for model in (plain, hybrid):
            first_alone(model)
        assert_same(state_of(plain), state_of(hybrid))
    for model in (plain, hybrid):
        model.zero_grad()
        torch.stack([output.square().sum() for output in model(x)]).sum().backward()
    assert_same(state_of(plain), state_of(hybrid))
    first_alone(hybrid)
    assert hybrid.plan.without_gradient == (), "what arrived once is planned for from then on"


def test_the_report_says_what_is_planned() -> None:
    hybrid = compiled(LanguageModel())
    assert hybrid.report().signatures[0].backward == "gradients arrive for outputs 1 of the call, not for 0"
    drop(hybrid)
    drop(hybrid)
    assert hybrid.report().signatures[0].backward.endswith("outputs 0 are dropped before it begins")
    assert hybrid.report().signatures[0].loss == "planned with the model"


def test_a_plan_file_says_which_backward_pass_it_is_for() -> None:
    plan = smallest(LanguageModel()).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.without_gradient, again.dropped) == ((0,), (0,))
    hybrid = compiled(LanguageModel(), plan.budget_bytes, plan=again)
    assert hybrid.plan.actions == plan.actions
    assert peak_bytes(drop, hybrid) == hybrid.plan.peak_bytes <= plan.budget_bytes
    other = compiled(LanguageModel())
    other.use_plan(again)
    assert other.plan.actions == plan.actions
    whole = compiled(nn.Sequential(nn.Embedding(VOCABULARY, WIDTH))).plan
    assert "dropped" not in whole.to_json()


def test_a_returned_value_that_is_saved_too() -> None:
    # The second output is saved for the backward pass of the first: it lives until its last use there, held or not.
    class Squashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(WIDTH, 64)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x).tanh()
            return {"loss": h.sum(), "h": h}

    x = torch.randn(ROWS, WIDTH)
    hybrid = compiled(Squashed(), example_inputs=(x,))

    def step(held: list[Tensor]) -> None:
        hybrid.zero_grad()
        output = hybrid(x)
        loss = output["loss"]
        held.append(output["h"].detach())
        del output
        if len(held) > 1:
            held.clear()
        loss.backward()

    step([x])
    step([x])
    assert hybrid.plan.dropped == (1,)
    measured = fxhybrid.measure_step(lambda: step([x]), modules=hybrid, tensors=x, repeats=0)
    assert measured.peak_bytes == hybrid.plan.peak_bytes
    step([])  # held, and the next plan knows
    step([])
    assert hybrid.plan.dropped == ()
