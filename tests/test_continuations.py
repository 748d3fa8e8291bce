"""Functions in which graphs end: what follows runs as Python runs it, and nothing waits that eager lets go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from tests.compare import twins
from tests.several_graphs_parts import WIDTH, X, loss_of, smallest, step


def ends(x: Tensor) -> Tensor:
    """Ends a graph within a function that another one calls."""
    x = x.sin()
    torch._dynamo.graph_break()
    return x * 2


def in_try(x: Tensor) -> Tensor:
    try:
        return ends(x) + ends(x.cos())
    finally:
        torch._dynamo.graph_break()


def raised(x: Tensor) -> Tensor:
    try:
        x = ends(x)
        raise KeyError(len(x))
    except KeyError as error:
        torch._dynamo.graph_break()
        return ends(x) * error.args[0]


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = ends(x).mean()
        torch._dynamo.graph_break()
        scale = scale + ends(x).std()
    return ends(x * scale)


def recursive(x: Tensor, depth: int = 3) -> Tensor:
    return x if depth == 0 else ends(recursive(ends(x), depth - 1)) + x


def branches(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return ends(x)
    x = ends(-x)
    return x if x.mean() > 0 else ends(x)


def in_closure(x: Tensor) -> Tensor:
    def scaled(y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return y * x

    return ends(scaled(x.exp())) + scaled(x)


def called_by_python(x: Tensor) -> Tensor:
    return torch.stack(sorted(map(ends, x.chunk(4)), key=lambda y: float(y.detach().sum())))


def keywords(x: Tensor) -> Tensor:
    return ends(x=ends(*[x]))


def listed(x: Tensor) -> Tensor:
    return torch.cat([ends(y) for y in (x, x * 3)])


FUNCTIONS = (
    in_try, raised, without_gradients, recursive, branches, in_closure, called_by_python, keywords, listed,
)  # fmt: skip


class Around(nn.Module):
    """Calls a function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_follows_a_graph_runs_as_in_eager(function: Callable[[Tensor], Tensor]) -> None:
    pair = twins(Around(function), example_inputs=(X,), loss_fn=loss_of)
    pair.same(step)
    pair.hybrid.set_budget(smallest(pair.hybrid))
    for seed in (1, 2):
        pair.same(step, seed=seed)


class Stages(nn.Module):
    """A chain of layers without residual connections, whose activations compress well."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)
        )
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.broken and i < 3:
                torch._dynamo.graph_break()
        return x


def test_a_graph_waits_for_nothing_that_later_ones_are_given() -> None:
    x = torch.randn(2048, WIDTH)
    whole, split = (
        fxhybrid.compile(Stages(broken=broken), budget=1.0, example_inputs=(x,), loss_fn=loss_of, solver="mps")
        for broken in (False, True)
    )
    assert smallest(split) <= 1.1 * smallest(whole)
