"""What cannot be captured in one graph: one error with the user's line and a way out that works."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

import fxhybrid
from fxhybrid.capture.capture import capture
from fxhybrid.capture.step import Loss, Step
from fxhybrid.errors import GraphBreakError
from tests.compare import twins

N = 16
LOCK = threading.Lock()


class Block(nn.Module):
    """A submodule in whose forward the operator stands."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def model_of(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(N, N), Block(function))


def in_one_graph(
    model: nn.Module, *args: Tensor, loss_fn: Loss | None = None, loss_args: tuple[Tensor, ...] = ()
) -> None:
    """Captures a model that takes several graphs as if it took one: the error names what is between them."""
    capture(Step(model.train(), loss_fn, False), (args, {}, loss_args))


def rows() -> Tensor:
    return torch.randn(4, N, generator=torch.Generator().manual_seed(0))


DYNAMIC: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda h: h.square().mean() * h.detach().abs().max().item(),
    "float": lambda h: h.square().mean() * float(h.detach().abs().max()),
    "boolean mask": lambda h: h[h.sum(1) > 0].square().mean(),
    "masked_select": lambda h: torch.masked_select(h, h > 0).sum(),
    "nonzero": lambda h: h.flatten()[(h > 0).flatten().nonzero()[:, 0]].sum(),
    "assigned value": lambda h: h.index_put((h > 0,), h.mean()).sum(),  # its gradient picks elements
    "filled value": lambda h: h.index_fill(0, torch.tensor([0, 2]), h.mean()).sum(),
    "split": lambda h: torch.tensor_split(h, h.argmax(1)[:2])[1].sum(),
    "equal": lambda h: h.sum() * torch.equal(h, h.sin()),
}
WAYS_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "without .item()": lambda h: h.square().mean() * h.detach().abs().max(),
    "torch.where(mask, x, 0)": lambda h: torch.where((h.sum(1) > 0)[:, None], h, 0).square().sum() / (h > 0).sum(),
    "torch.where(mask, value, x)": lambda h: torch.where(h > 0, h.mean(), h).sum(),
    "weigh them with a mask": lambda h: (h * (h > 0)).sum(),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_results_that_depend_on_values(name: str) -> None:
    with pytest.raises(GraphBreakError) as caught:
        in_one_graph(model_of(DYNAMIC[name]), rows())
    text = str(caught.value)
    line = DYNAMIC[name].__code__.co_firstlineno
    assert f"{__file__}:{line}" in text
    assert "in module '1'" in text or name == "equal"
    assert "site-packages" not in text
    assert any(way in text for way in WAYS_OUT)


@pytest.mark.parametrize("name", WAYS_OUT)
def test_ways_out_of_results_that_depend_on_values(name: str) -> None:
    pair = twins(model_of(WAYS_OUT[name]))
    pair.same(lambda m: m(rows()).backward())


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "random.random": lambda h: h.sum() * random.random(),
    "random.sample": lambda h: h[random.sample(range(4), 3)].sum(),
    "random.randint": lambda h: h[: random.randint(1, 4)].sum(),
    "own generator": lambda h: h.sum() * OWN.random(),
    "numpy": lambda h: h.sum() * np.random.beta(1, 1),  # noqa: NPY002
    "numpy's generator": lambda h: h.sum() * GENERATOR.random(),
}
GENERATOR, OWN = np.random.default_rng(0), random.Random(0)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_random_numbers_of_python(name: str) -> None:
    with pytest.raises(
        GraphBreakError, match=r"(?s)raw the random number before.*torch\.rand.*torch\.randperm"
    ) as caught:
        in_one_graph(model_of(RANDOM[name]), rows())
    assert f"{__file__}:{RANDOM[name].__code__.co_firstlineno}" in str(caught.value)
    assert "Hint" not in str(caught.value)


def test_ways_out_of_random_numbers_of_python() -> None:
    """A number is a tensor, or a float: one more plan for its second value, none for later ones."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(N, N)

        def forward(self, x: Tensor, weight: Tensor | float) -> Tensor:
            h = self.linear(x)
            mixed = weight * h + (1 - weight) * h[torch.randperm(4)]
            return (mixed * torch.rand(())).sum()

    pair = twins(Mixed())
    for make, n_plans in ((torch.tensor, 1), (float, 3)):
        for weight in (0.3, 0.7, 0.2):
            pair.same(lambda m: m(rows(), make(weight)).backward())  # noqa: B023
            pair.plain.zero_grad()
            pair.hybrid.zero_grad()
        assert len(pair.hybrid.plans) == n_plans


def test_uniform_numbers_of_python_are_drawn_at_each_call() -> None:
    pair = twins(model_of(lambda h: (h * random.uniform(0.5, 1.5)).sum() * random.uniform(0.5, 1.5)), budget="1MiB")

    def step(m: nn.Module) -> list[Tensor]:
        random.seed(0)
        m.zero_grad()
        return [m(rows()) for _ in range(2)]

    first, second = pair.same(step)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_observers_of_quantization() -> None:
    """They get their sizes in their first run, which is the way out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    model = quantization.prepare_qat(model)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(fxhybrid.CaptureError, match=r"(?s)buffer '0\..*min_val'.*Run the plain model once"):
        fxhybrid.compile(model, budget=1.0, example_inputs=(x,))
    model(x)
    pair = twins(model)
    pair.same(lambda m: m(x).square().sum().backward())


def test_checks_of_values_stay_checks() -> None:
    def checked(h: Tensor) -> Tensor:
        torch._check_tensor_all(h < 1e3)
        return h.square().mean()

    pair = twins(model_of(checked), example_inputs=(rows(),))
    pair.same(lambda m: m(rows()).backward())
    for model in (pair.plain, pair.hybrid):
        model.zero_grad()
        with pytest.raises(RuntimeError):
            model(1e6 * rows())


def test_an_exception_that_only_the_trace_raises_is_named() -> None:
    model = model_of(lambda h: h.sum() if not torch.compiler.is_compiling() else [][1])
    with pytest.raises(GraphBreakError, match=r"(?s)is_compiling.*The trace raised exception IndexError"):
        in_one_graph(model, rows())


def test_a_model_that_computes_something_else_when_it_is_compiled_is_named() -> None:
    model = model_of(lambda h: h.square().sum() if torch.compiler.is_compiling() else h.sum())
    with pytest.raises(fxhybrid.CaptureError, match=r"asks torch\.compiler\.is_compiling\(\) and computes something"):
        fxhybrid.compile(model, budget=1.0, example_inputs=(rows(),))


def test_what_is_set_up_under_a_lock_at_the_first_call() -> None:
    """As transformers installs its hooks for hidden states."""

    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.ready = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                with LOCK:
                    self.ready = True
            return self.body(x).square()

    x, model = torch.randn(3, 4), Guarded()
    with pytest.raises(GraphBreakError, match=r"(?s)with LOCK.*If that block.*call the model once before"):
        in_one_graph(model, x)
    model(x)  # the way out
    twins(model, example_inputs=(x,)).same(lambda m: (loss := m(x).sum(), loss.backward())[0])


def test_an_item_that_is_only_shown() -> None:
    pair = twins(model_of(lambda h: (print(h.sum().item()), h.sum())[1]))
    pair.same(lambda m: m(rows()).backward())


def test_a_branch_on_values_names_the_line() -> None:
    def function(h: Tensor) -> Tensor:
        if h.sum() > 0:
            return h.sum()
        return F.relu(h).sum()

    with pytest.raises(GraphBreakError, match="Python control flow") as caught:
        in_one_graph(model_of(function), rows())
    assert f"{__file__}:{function.__code__.co_firstlineno + 1}" in str(caught.value)


def test_other_calls_are_no_control_flow() -> None:
    checked = {"validate_args": True}
    with pytest.raises(GraphBreakError, match="Leave that call out") as caught:
        in_one_graph(model_of(lambda h: torch.distributions.Normal(h, h.exp(), **checked).mean.sum()), rows())
    text = str(caught.value)
    assert f"  at {__file__}" in text
    assert "control flow" not in text


def test_inputs_that_overlap_only_later() -> None:
    """A graph that changes an input in place holds only while the others lie in other memory."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(N, N)

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache[:, :4] += 1
            return self.linear(x).sum()

    pair = twins(Cache())

    def step(m: nn.Module, make: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
        m.zero_grad()
        x, cache = make()
        m(x, cache).backward()
        return [x, cache]

    def overlapping() -> tuple[Tensor, Tensor]:
        memory = torch.cat([rows(), rows()])
        return memory[:4], memory[2:6]

    for _ in range(2):
        pair.same(lambda m: step(m, lambda: (rows(), rows())))
    assert len(pair.hybrid.plans) == 1
    pair.same(lambda m: step(m, lambda: (rows(),) * 2))
    with pytest.raises(fxhybrid.CaptureError, match="share memory"):
        step(pair.hybrid, overlapping)
    step(pair.hybrid, lambda: tuple(t.clone() for t in overlapping()))  # the way out


@pytest.mark.parametrize("loss_fn", [None, lambda output: output.square().mean()], ids=["outputs", "loss"])
def test_a_call_in_which_nothing_needs_a_gradient(loss_fn: Callable[[Tensor], Tensor] | None) -> None:
    """It runs the plain model, as the frozen half of a pair does; planned again once parameters are thawed."""
    model = model_of(torch.relu)
    hybrid = fxhybrid.compile(model, budget=1.0, loss_fn=loss_fn)
    model.requires_grad_(False)
    frozen = hybrid(rows())
    expected = model(rows())
    assert torch.equal(frozen, loss_fn(expected) if loss_fn else expected)
    assert not hybrid.plans
    model.requires_grad_(True)
    hybrid(rows()).sum().backward()
    assert len(hybrid.plans) == 1


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_modules_that_run_in_the_backward_pass(register: str) -> None:
    """Refused with the hook's line; both ways out give eager's bits."""
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    hook = lambda *arguments: None  # noqa: E731
    handle = getattr(model[1], register)(hook)
    hybrid = fxhybrid.compile(model, budget=1.0)
    with pytest.raises(fxhybrid.CaptureError, match="module '1' has a backward hook") as caught:
        hybrid(rows())
    assert f"{__file__}:{hook.__code__.co_firstlineno}" in str(caught.value)
    handle.remove()
    hybrid(rows()).sum().backward()

    def function(h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient * 0.5)
        return h.sum()

    twins(model_of(function)).same(lambda m: m(rows()).backward())


def test_a_layer_of_torchs_names_its_line_where_no_line_is_the_users() -> None:
    """This layer picks rows by their cluster, as many as there are."""
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU())
    loss = nn.AdaptiveLogSoftmaxWithLoss(N, 10, [4])
    with pytest.raises(GraphBreakError, match=r"  at .*adaptive\.py:\d+, in forward"):
        in_one_graph(model, rows(), loss_fn=loss, loss_args=(torch.tensor([1, 5, 2, 9]),))


def test_what_is_changed_in_place_behind_another_output() -> None:
    """Eager trains the first output, and fails only where the second one gets a gradient."""

    def function(h: Tensor, *, detached: bool = False) -> tuple[Tensor, Tensor]:
        y = h.exp()
        other = y.square()
        y = y.add_(1) * 2
        return h.sin() * y.detach(), other.detach() if detached else other

    with pytest.raises(
        fxhybrid.CaptureError, match=r"changes in place what the gradient of an output needs[\s\S]*detach"
    ):
        fxhybrid.compile(model_of(function), budget=1.0, example_inputs=(rows(),), solver="mps")
    pair = twins(model_of(partial(function, detached=True)))

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(rows())[0].sum().backward()

    pair.same(step)
