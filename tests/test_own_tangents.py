"""Backward halves overwrite gradients that nobody else can look at, and leave those alone that somebody holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import graph_break
from torch.profiler import profile

import fxhybrid
from fxhybrid import HybridModule
from fxhybrid.ops.own_storage import Probe, own_or_new
from tests.compare import MARGIN
from tests.several_graphs_parts import WIDTH, X, loss_of, peak_bytes, smallest, step

N_LAYERS = 4


class Layers(nn.Module):
    """Layers that end with an activation, with Python between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(N_LAYERS))
        self.between: Callable[[Tensor], object] = lambda _: None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            graph_break()
            self.look(x)
        return x

    @torch.compiler.disable
    def look(self, x: Tensor) -> None:
        self.between(x)


def compiled(model: nn.Module) -> HybridModule:
    return fxhybrid.compile(model, budget=1.0, example_inputs=(X,), loss_fn=loss_of, compression="lossless")


def test_gradients_are_overwritten_where_nobody_holds_them() -> None:
    hybrid = compiled(Layers())
    for _ in range(20):
        step(hybrid)
    with profile() as profiled:
        step(hybrid)
    new = [event.count for event in profiled.key_averages() if event.key == "aten::empty_like"]
    assert sum(new) == 1  # the gradient of the loss, which backward() makes
    for budget in (hybrid.plan.budget_bytes, int(MARGIN * smallest(hybrid))):
        hybrid.set_budget(budget)
        assert peak_bytes(hybrid) <= budget


@pytest.mark.parametrize("holds", ["retain_grad", "hook", "view of a hook", "array of a hook"])
def test_gradients_that_somebody_holds_stay_as_they_are(holds: str) -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        held: list[object] = []
        keep: dict[str, Callable[[Tensor], object]] = {
            "hook": lambda g: held.append(g),
            "view of a hook": lambda g: held.append(g[:, 1:]),
            "array of a hook": lambda g: held.append(g.numpy()),
        }

        def between(x: Tensor) -> None:
            if holds == "retain_grad":
                x.retain_grad()
                held.append(x)
            else:
                x.register_hook(lambda g: (keep[holds](g), None)[1])

        for _ in range(20):  # the interpreter specializes what runs often
            step(model)
        model.between = between  # type: ignore[assignment]
        step(model)
        found = [x.grad if holds == "retain_grad" else torch.as_tensor(x) for x in held]  # type: ignore[attr-defined]
        return [*found, *(p.grad for p in model.parameters())]

    expected, found = gradients(Layers()), gradients(compiled(Layers()))
    assert len(expected) == 3 * N_LAYERS
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_second_backward_pass_gives_the_same() -> None:
    hybrid = compiled(Layers())
    loss = hybrid(X)
    first, second = (torch.autograd.grad(loss, list(hybrid.parameters()), retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, second))


def test_tensors_that_are_held_get_a_new_one() -> None:
    """However often the interpreter has run the code, which it specializes, and whether or not Dynamo has been used."""

    def is_own(made: list[Tensor]) -> bool:
        x = made.pop()
        probe = Probe()
        return own_or_new(x, probe).data_ptr() == x.data_ptr()

    held = torch.ones(3)
    kept: list[Tensor] = []

    def look() -> list[bool]:
        twice = torch.ones(3)
        kept[:] = [twice, twice]
        return [is_own([torch.ones(3)]), is_own([held]), is_own([twice]), is_own([torch.ones(3)[1:]])]

    expected = [True, False, False, False]  # the last one is a view of a larger storage
    assert [look() for _ in range(100)] == [expected] * 100
    torch.compile(torch.sin, backend="eager")(torch.ones(1))
    assert [look() for _ in range(100)] == [expected] * 100
