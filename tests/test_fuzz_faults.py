"""Faults that random modules have found, one test for each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from tests.compare import tighten, twins
from tests.operator_parts import Head, check, rows

BAG = torch.ops.aten._embedding_bag.default


class TwoLayouts(nn.Module):
    """The gradients of a view's readers lie in memory in different orders; their sum has that of one of them."""

    def __init__(self, readers: tuple[str, ...]) -> None:
        super().__init__()
        self.readers = readers
        self.trunk = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x).view(4, 6, 8)
        made = {"in order": lambda: h.exp(), "turned": lambda: h.transpose(0, 1).contiguous().sin()}
        return [made[name]() for name in self.readers]


@pytest.mark.parametrize("readers", list(permutations(("in order", "turned"))), ids=str)
@pytest.mark.parametrize("chosen", [0, 1])
def test_a_lone_summand_in_another_layout(readers: tuple[str, ...], chosen: int) -> None:
    pair = twins(TwoLayouts(readers))

    def step(model: nn.Module) -> list[Tensor]:
        outputs = model(torch.randn(24, 6))
        outputs[chosen].square().sum().backward()
        return outputs

    pair.same(step)


class Turned(nn.Module):
    """A random operator on a tensor that is not contiguous."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.trunk(x).transpose(1, 2)).exp()


IN_MEMORY_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout in place": lambda h: F.dropout(h, 0.5, inplace=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
}


@pytest.mark.parametrize("name", IN_MEMORY_ORDER)
def test_random_numbers_in_memory_order(name: str) -> None:
    pair = twins(Turned(IN_MEMORY_ORDER[name]))

    def step(model: nn.Module) -> Tensor:
        out = model(torch.randn(3, 5, 8))
        out.square().sum().backward()
        return out

    pair.same(step)
    tighten(pair.hybrid)
    pair.plain.zero_grad()
    pair.hybrid.zero_grad()
    pair.same(step)


CELLS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "GRUCell": lambda h, m: m(h[:, 0].tanh(), m(h[:, 1])),
    "RNN": lambda h, m: m(h.transpose(0, 1))[0].transpose(0, 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_layers_round_as_in_eager(name: str) -> None:
    """Gates in slices of a matrix, and products with weights that need a gradient, take kernels of their own."""
    layer = {"GRUCell": nn.GRUCell, "RNN": nn.RNN}[name](16, 16)
    check(Head(CELLS[name], layer), rows(3, 9, 16))


def test_a_pool_whose_inputs_begin_with_a_size() -> None:
    """Its gradient reads a shape only, which a graph of many sizes computes from its first input, a number."""
    pair = twins(nn.AvgPool2d(2), budget=1 << 20)

    def step(model: nn.Module, batch: int, pixels: int) -> Tensor:
        x = torch.randn(batch, 3, pixels, pixels, requires_grad=True)
        model(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    for batch, pixels in ((2, 8), (4, 8), (5, 10), (3, 6)):
        pair.same(partial(step, batch=batch, pixels=pixels))


class Dropped(nn.Module):
    """Drops nothing, and changes what is left in place: dropout gives back its argument then."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.trunk, self.dropout = nn.Linear(8, 8), nn.Dropout(rate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.dropout(h).relu_(), h * 2


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_of_nothing_is_no_copy(rate: float) -> None:
    model = Dropped(rate)
    model.dropout.eval()
    if rate == 0:
        model.dropout.train()
    pair = twins(model, budget=1 << 20)

    def step(model: nn.Module) -> tuple[Tensor, Tensor]:
        first, second = model(torch.randn(3, 8))
        (first.square().mean() + second.square().mean()).backward()
        return first, second

    pair.same(step)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_embedding_bags_keep_is_counted(mode: str, dtype: torch.dtype) -> None:
    """The kernel makes one more number than there are indices, and a size for each offset, the last one included."""
    model = nn.EmbeddingBag(7, 3, mode=mode, include_last_offset=True, dtype=dtype)
    words, offsets = torch.randint(7, (40,)), torch.tensor([0, 10, 40])
    hybrid = fxhybrid.compile(model, budget=1 << 20, example_inputs=(words, offsets), compression="off")
    sizes = {tensor.name: tensor.size_bytes for tensor in hybrid.planning_problem.tensors}
    number = {"sum": 0, "mean": 1, "max": 2}[mode]
    results = BAG(model.weight, words, offsets, False, number, False, None, True)
    for i in (1, 2):
        assert sizes[f"_embedding_bag.default.0:{i}"] == results[i].untyped_storage().nbytes()
