"""What Python's own operators take in the backward pass, between the graphs of a step, and behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import CaptureError
from fxhybrid.segments.backward_recording import ZeroHalves
from tests.compare import Twins, twins
from tests.several_graphs_parts import WIDTH, X, smallest


class Between(nn.Module):
    """Two layers with Python's own operators between and behind."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.join, self.loss = torch.compiler.disable(join), torch.compiler.disable(loss)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = self.join(h, self.last(self.join(h, h)).tanh())
        return self.loss(self.last(h).tanh())


def plain(h: Tensor) -> Tensor:
    return h.square().mean()


def steep(h: Tensor) -> Tensor:
    """Keeps one tensor of 64 times the size and takes two in the forward pass, three in the backward pass."""
    return h.repeat(1, 64).sinh().mean()


def skip(early: Tensor, late: Tensor) -> Tensor:
    """Leaves a gradient that passes the layer."""
    return early * late


def steep_skip(early: Tensor, late: Tensor) -> Tensor:
    return early + late.repeat(1, 64).sinh().view(*late.shape, 64).mean(2)


class Weights(nn.Module):
    """Is large, and Python's own operators make its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((64 * WIDTH, WIDTH), 0.01))

    def forward(self, h: Tensor) -> Tensor:
        return (h @ self.weights.t()).square().mean()


STEPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "behind": (skip, steep),
    "between": (steep_skip, plain),
    "both": (steep_skip, steep),
    "weights": (skip, Weights()),
}


def step(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss: Tensor = model(X)
    loss.backward()
    return loss.detach()


def peak_bytes(pair: Twins) -> int:
    return fxhybrid.measure_step(
        lambda: (step(pair.hybrid), None)[1], modules=pair.hybrid, tensors=X, repeats=0
    ).peak_bytes


@pytest.mark.parametrize("name", STEPS)
def test_what_pythons_operators_take_in_backward_counts(name: str) -> None:
    pair = twins(Between(*STEPS[name]).train(), example_inputs=(X,))
    for budget in (pair.hybrid.plan.budget_bytes, smallest(pair.hybrid)):
        pair.hybrid.set_budget(budget)
        pair.same(step)
        measured = peak_bytes(pair)
        assert measured <= budget <= 1.02 * measured


class Returning(nn.Module):
    """Returns what Python makes of an early value, before and behind the last layer, the last one, and one cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.by_python = torch.compiler.disable(torch.sin)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.first(x).tanh()
        early = self.by_python(h)
        last = self.last(h).tanh().exp().exp()
        return early, last, self.by_python(h), h.detach()


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_results_count_whether_or_not_they_get_a_gradient(chosen: tuple[int, ...]) -> None:
    """Where early ones do, what the last layer stores stays; gradients from a caller live to the end.

    A gradient that Python makes of the late one is there while the last layer's half runs, and is added to afterwards.
    """

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        model.zero_grad()
        results = model(X)
        torch.autograd.backward([results[i] for i in chosen], [torch.ones_like(results[i]) for i in chosen])
        return tuple(t.detach() for t in results)

    pair = twins(Returning().train(), example_inputs=(X,))
    for budget in (pair.hybrid.plan.budget_bytes, smallest(pair.hybrid)):
        pair.hybrid.set_budget(budget)
        pair.same(run)
        measured = fxhybrid.measure_step(lambda: run(pair.hybrid), modules=pair.hybrid, tensors=X, repeats=0)
        assert measured.peak_bytes <= budget


def test_leaves_see_nothing_of_a_recorded_backward_pass() -> None:
    seen: list[Tensor] = []
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    hook = weight.register_hook(seen.append)
    weight.register_post_accumulate_grad_hook(seen.append)
    halves = ZeroHalves(lambda: None, lambda: None)
    assert halves.run([(weight * 2).sum()])
    assert seen == []
    assert torch.equal(weight.grad, torch.ones(3))
    (weight * 2).sum().backward()
    assert len(seen) == 2
    hook.remove()
    (weight * 2).sum().backward()
    assert len(seen) == 3


def test_gradients_within_the_forward_pass_are_refused_by_name() -> None:
    class Penalized(Between):
        def forward(self, x: Tensor) -> Tensor:
            h = self.last(self.join(x, self.first(x).tanh()))
            (gradient,) = self.slope(h)
            return (h * gradient).square().mean()

        @torch.compiler.disable
        def slope(self, h: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(h.sum(), self.first.weight, retain_graph=True)

    with pytest.raises(CaptureError, match="in Python between them"):
        fxhybrid.compile(Penalized(skip, plain).train(), budget=1.0, example_inputs=(X,), solver="mps")


@pytest.mark.parametrize("raises", [False, True])
def test_a_backward_pass_that_cannot_be_run_with_zeros_is_not_recorded(raises: bool) -> None:
    def checked(gradient: Tensor) -> Tensor:
        assert not raises or gradient.any(), "no gradient at all"
        return gradient.clone()

    def join(early: Tensor, late: Tensor) -> Tensor:
        late.register_hook(checked)
        return early + late

    pair = twins(Between(join, plain).train(), example_inputs=(X,))
    pair.same(step)
    assert peak_bytes(pair) <= pair.hybrid.plan.budget_bytes
