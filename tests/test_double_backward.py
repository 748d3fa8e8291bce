"""Gradients of gradients: planned where the model computes them itself, refused where the caller asks for them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from tests.compare import assert_same, state_of
from tests.operator_parts import check

Net = Callable[[Tensor], Tensor]


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def penalty_of(score: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


class Penalised(nn.Module):
    """Computes its own gradient penalty; the input needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = critic()

    def forward(self, x: Tensor) -> Tensor:
        score = self.net(x)
        return score.mean() + 10 * penalty_of(score, x)


class Forces(nn.Module):
    """An energy model that gives forces: the negative gradient by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = critic()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy = self.net(x).sum()
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, -slope


INNER: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "max pool": lambda: nn.MaxPool2d(2),
    "average pool": lambda: nn.AvgPool2d(2),
    "convolution and batch norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", INNER)
def test_penalties_through_layers_with_a_low_memory_backward(name: str) -> None:
    """Their inner gradient is part of the forward pass, where rewrites of the backward pass have no place."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Conv2d(3, 4, 3), INNER[name]()

        def forward(self, x: Tensor) -> Tensor:
            score = self.inner(self.first(x)).square().sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return score + slope.square().sum()

    check(Net(), torch.randn(2, 3, 8, 8).requires_grad_())


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_the_caller_may_not_differentiate_twice() -> None:
    hybrid = fxhybrid.compile(critic(), budget="1GiB", compression="off")
    x = torch.randn(4, 8, requires_grad=True)
    refusal = r"create_graph=True.*inside the model's forward or inside loss_fn"
    with pytest.raises(fxhybrid.BackwardError, match=refusal):
        torch.autograd.grad(hybrid(x).sum(), x, create_graph=True)
    with pytest.raises(fxhybrid.BackwardError, match=refusal):
        hybrid(x).sum().backward(create_graph=True)


def test_the_next_step_is_right() -> None:
    plain = critic()
    hybrid = fxhybrid.compile(copy.deepcopy(plain), budget="1GiB", compression="off")
    x = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(fxhybrid.BackwardError):
        torch.autograd.grad(hybrid(x).sum(), x, create_graph=True)
    for net in (plain, hybrid):
        net(x.detach()).sum().backward()
    assert_same(state_of(plain), state_of(hybrid))


def test_a_penalty_inside_the_model_is_planned() -> None:
    plain = Penalised()
    hybrid = fxhybrid.compile(copy.deepcopy(plain), budget=1.0, compression="off")
    x = torch.randn(16, 8, requires_grad=True)
    for net in (plain, hybrid):
        net(x).backward()
    assert_same(state_of(plain), state_of(hybrid))


def test_a_penalty_inside_the_loss_is_planned() -> None:
    x = torch.randn(16, 8, requires_grad=True)

    def loss_fn(score: Tensor, x: Tensor) -> Tensor:
        return score.mean() + 10 * penalty_of(score, x)

    plain = critic()
    hybrid = fxhybrid.compile(copy.deepcopy(plain), budget=1.0, compression="off", loss_fn=loss_fn)
    loss_fn(plain(x), x).backward()
    hybrid(x, loss_args=(x,)).backward()
    assert_same(state_of(plain), state_of(hybrid))


def test_forces_inside_the_model_are_planned() -> None:
    plain = Forces()
    hybrid = fxhybrid.compile(copy.deepcopy(plain), budget=1.0, compression="off")
    x, wanted = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
    for net in (plain, hybrid):
        energy, forces = net(x)
        (energy + (forces - wanted).square().sum()).backward()
    assert_same(state_of(plain), state_of(hybrid))
