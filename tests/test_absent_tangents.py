"""Outputs that get no gradient: their branches do not run, as in eager."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import measure_step
from fxhybrid.capture.capture import capture
from fxhybrid.passes.prune_tangents import prune_tangents
from tests.compare import assert_same, state_of, tighten
from tests.graph_text import graph_text


class TwoHeads(nn.Module):
    """A trunk that two heads share, as losses of several tasks do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.a(h), torch.sigmoid(self.b(h))


class Distances(nn.Module):
    """The second output's gradient is 0/0 for equal pairs; zeros in its place would give NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.head(h), (h[:4] - h[4:]).square().sum(-1).sqrt()


class Parts(nn.Module):
    """Each output is a part of one tensor: one operator of several outputs, of which some get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.last = nn.Linear(6, 9), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one, two, three = torch.tanh(self.trunk(x)).chunk(3, -1)
        return one.exp(), self.last(two), three.sin()


class Chain(nn.Module):
    """Each output is made from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for layer in self.layers:
            x = self.norm(torch.relu(layer(x)) + x)
            outputs.append(x)
        return tuple(outputs)


class States(nn.Module):
    """A recurrent layer's sequence and last state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sequence, state = self.layer(x.view(4, 2, 6))
        return sequence, state


class Joined(nn.Module):
    """Gradients of two parts are themselves parts of one that may not arrive, and are joined with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two, three = self.trunk(x).chunk(3, -1)
        return three.exp(), 2 * torch.cat([one, two], 1)


MODELS = (TwoHeads, Distances, Parts, Chain, States, Joined)


def subsets(n: int) -> Iterator[tuple[int, ...]]:
    """All sets of outputs that get a gradient, the empty one left out."""
    for size in range(1, n + 1):
        yield from combinations(range(n), size)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("model_class", MODELS)
def test_any_set_of_tangents_gives_eagers_bits(model_class: type[nn.Module], tight: bool) -> None:
    torch.manual_seed(2)
    plain = model_class().train()
    x = torch.randn(8, 6)
    x[4] = x[0]  # one equal pair, for Distances
    hybrid = fxhybrid.compile(
        copy.deepcopy(plain), budget=1.0, example_inputs=(torch.randn(8, 6),), compression="lossless", solver="mps"
    )
    if tight:
        tighten(hybrid)
    for chosen in subsets(len(plain(x))):
        if model_class is Distances and 1 in chosen:
            continue  # NaN in eager, too
        for net in (plain, hybrid):
            net.zero_grad()
            outputs = net(x)
            torch.stack([outputs[i].square().sum() for i in chosen]).sum().backward()
        assert_same(state_of(plain), state_of(hybrid))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_backward_pass_after_another(order: tuple[int, int]) -> None:
    # with the graph retained each loss has a backward pass of its own; the gradients add up
    plain = TwoHeads()
    hybrid = fxhybrid.compile(copy.deepcopy(plain), budget="1GiB", compression="lossless", solver="mps")
    x = torch.randn(8, 6)
    for net in (plain, hybrid):
        outputs = net(x)
        for i in order:
            outputs[i].square().sum().backward(retain_graph=True)
    assert_same(state_of(plain), state_of(hybrid))


def test_golden_text() -> None:
    # With the second tangent missing, the sum of both branches' gradients of sin's input is the first one alone.
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.w * x
            return h.sin(), h.cos()

    joint = capture(Sum(), (torch.ones(3),)).joint
    text = graph_text(prune_tangents(joint, frozenset([1])))
    backward = [line for line in text.splitlines() if line.startswith("B ") and "=" in line]
    assert [line.split(" = ")[1].split("(")[0] for line in backward] == ["cos", "mul.Tensor", "mul.Tensor"]
    assert "cos(mul)" in text  # the forward half stays whole: the second output is still wanted


@pytest.mark.parametrize("missing", [frozenset([0]), frozenset([1])])
def test_the_missing_branch_is_gone(missing: frozenset[int]) -> None:
    joint = capture(TwoHeads(), (torch.randn(8, 6),)).joint
    whole, pruned = graph_text(joint), graph_text(prune_tangents(joint, missing))
    count = [sum(line.startswith("B ") for line in text.splitlines()) for text in (whole, pruned)]
    assert count[1] < count[0]
    assert ("sigmoid_backward" in pruned) is (missing == frozenset([0]))


class Joined(nn.Module):
    """The gradient of what is joined is a sum over the outputs, of which each part is a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.a(x), self.b(x)], 1)
        return joined * 2, joined * 3


def test_views_of_a_sum_look_at_the_summand_that_is_left() -> None:
    joint = prune_tangents(capture(Joined(), (torch.randn(5, 6),)).joint, frozenset([1]))
    slices = [node for node in joint.module.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
    assert len(slices) == 2
    for node in slices:
        (base,) = node.all_input_nodes
        assert base.target is torch.ops.aten.mul.Tensor
        assert node.meta["val"].untyped_storage()._cdata == base.meta["val"].untyped_storage()._cdata


class Shuffled(nn.Module):
    """The gradients of the two outputs lie in memory in different orders; the sum takes that of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, 2).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.nn.functional.pixel_shuffle(self.conv(x), 2)
        return h * 3, h.contiguous() * 2


def test_strides_behind_a_sum_follow_the_summand_that_is_left() -> None:
    joint = prune_tangents(capture(Shuffled(), (torch.randn(2, 3, 8, 8),)).joint, frozenset([1]))
    (node,) = [n for n in joint.module.graph.nodes if n.target is torch.ops.aten.pixel_unshuffle.default]
    (gradient,) = node.all_input_nodes
    for value in (gradient.meta["val"], node.meta["val"]):  # the kernel keeps the memory format
        assert value.is_contiguous(memory_format=torch.channels_last)


class NormOfChannels(nn.Module):
    """Has a gradient in channels_last that is added to one in the usual layout, if that arrives."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), last

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.last(self.first(x).relu())
        return torch.nn.functional.layer_norm(h.permute(0, 2, 3, 1), (8,)), h


LAST = {
    "convolution": lambda: nn.Conv2d(8, 8, 3, padding=1),  # its split form follows the gradient's layout
    "1 x 1": lambda: nn.Conv2d(8, 8, 1),  # sums its bias's gradient in the layout that comes
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "group norm": lambda: nn.GroupNorm(2, 8),  # autograd's formula copies the gradient
    "batch norm": lambda: nn.BatchNorm2d(8),
    "max pool": lambda: nn.MaxPool2d(2),  # the kernel copies the gradient
    "softmax": lambda: nn.Softmax(1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", LAST)
def test_what_is_left_of_a_sum_is_in_another_layout(last: str, dtype: torch.dtype) -> None:
    """Gradients have eager's bits, and a plan for all tangents holds where one does not arrive."""
    torch.manual_seed(0)
    plain, x = NormOfChannels(LAST[last]()).to(dtype), torch.randn(6, 8, 16, 16, dtype=dtype)
    hybrid = fxhybrid.compile(copy.deepcopy(plain), budget="smallest", compression="lossless")

    def step(model: nn.Module) -> None:
        model.zero_grad()
        output = model(x)[0]
        output.backward(output.detach().sin())  # sums of ones would be exact in any order

    for _ in range(2):
        step(plain)
        step(hybrid)
        for mine, own in zip(hybrid.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, own.grad)
            assert mine.grad.stride() == own.grad.stride()
    hybrid.zero_grad()

    def whole() -> None:
        step(hybrid)
        hybrid.zero_grad()

    measured = measure_step(whole, modules=hybrid, tensors=x, repeats=0)
    assert measured.peak_bytes <= hybrid.plan.budget_bytes
