"""Operators overwrite inputs that nobody looks at afterwards, with the same bits, and both halves peak as predicted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxhybrid
from fxhybrid.ops.hand_on import HAND_ON
from fxhybrid.passes.in_place import GRADIENT_INPUT, IN_PLACE, OVERWRITES, emit_in_place, owns_results
from fxhybrid.profiling.allocator import measure_step

aten = torch.ops.aten
MORE: dict[Any, tuple[Any, ...]] = {  # arguments behind the tensors
    aten.threshold_backward.default: (0.25,),
    aten.hardtanh_backward.default: (-0.5, 0.5),
}
N_TENSORS = {aten.add.Tensor: 2, aten.div.Tensor: 2, aten.mul.Tensor: 2, aten.sub.Tensor: 2}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", [*IN_PLACE, *GRADIENT_INPUT], ids=str)
def test_forms_in_place_give_the_same_bits(operator: Any, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [LAYOUTS[layout](torch.randn(3, 5, 7, 9, generator=generator).to(dtype)) for _ in range(2)]
    if operator is torch.ops.fxhybrid.apply_mask.default:
        tensors[1] = tensors[1] > 0
    backward = operator in GRADIENT_INPUT or operator is torch.ops.fxhybrid.apply_mask.default
    args = (*tensors[: 2 if backward else N_TENSORS.get(operator, 1)], *MORE.get(operator, ()))
    expected = operator(*args)

    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") if isinstance(a, Tensor) else a for i, a in enumerate(args)]
    node = graph.call_function(operator, tuple(nodes))
    node.meta[OVERWRITES] = 0
    emit_in_place(node)
    graph.output(node)
    found = fx.GraphModule({}, graph)(*tensors[: len([a for a in args if isinstance(a, Tensor)])])
    assert found.data_ptr() == tensors[0].data_ptr()
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


class Block(nn.Module):
    """Adds a branch to what it gets, as residual nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the mean square, after three layers."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)) + x)
        return x.square().mean()


def forms_in_place(hybrid: fxhybrid.HybridModule) -> list[str]:
    """Lists the operators that overwrite an argument."""
    nodes = [*hybrid.forward_graph.graph.nodes, *hybrid.backward_graph.graph.nodes]
    written = {*IN_PLACE.values(), *GRADIENT_INPUT.values()}
    return [str(n.target).removeprefix("aten.") for n in nodes if n.target in written]


def test_residual_blocks_work_in_place_and_peak_as_predicted() -> None:
    torch.manual_seed(0)
    model, images = Block(), torch.randn(4, 4, 32, 32)
    plain = copy.deepcopy(model)
    plain(images).backward()
    hybrid = fxhybrid.compile(model, budget=1.0, example_inputs=(images,), compression="off")
    found = forms_in_place(hybrid)
    # Forward: each sum in the storage of the norm's result and each relu in that of its sum, which nobody reads again;
    # the last relu is left out where the half has its peak. Backward: the gradient of a relu in that of its result.
    assert found.count("add_.Tensor") >= 3
    assert found.count("relu_.default") >= 2
    assert found.count("threshold_backward.grad_input") >= 2

    def step() -> None:
        model.zero_grad()
        hybrid(images).backward()

    budgets: tuple[float | str, ...] = (1.0, 0.9, "smallest")
    for budget in budgets:
        hybrid.set_budget(budget)
        assert measure_step(step, modules=model, tensors=images, repeats=0).peak_bytes == hybrid.plan.peak_bytes
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None)


def _with_transpose(x: Tensor) -> Tensor:
    return x * x.t()


KEPT: list[Tensor] = []


@torch.library.custom_op("in_place_tests::keep", mutates_args=())
def keep(x: Tensor) -> Tensor:
    """Returns a scalar, and keeps what it is given."""
    KEPT.append(x)
    return x.sum()


@keep.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(())


def _kept(x: Tensor) -> Tensor:
    return x + keep(x) * 0


HELD: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "returned": lambda h: ((h * 2).relu().sum(), h),
    "a view of it returned": lambda h: ((h * 2).relu().sum(), h[:2]),
    "read again": lambda h: ((h.relu() * h).sum(),),
    "a view of it read again": lambda h: ((h.relu()[:2] * h[:2]).sum(),),
    "read twice at once": lambda h: ((h + h).sum() + (h * h.t()).sum(),),
    "kept for backward": lambda h: ((h.sin() * h.cos()).sum(),),  # cos is read last by a product with sin's gradient
    "its own transpose read": lambda h: ((_with_transpose(h.detach() * 2) * h).sum(),),
    "expanded": lambda h: ((h[:1].expand(8, 8) + 1).relu().square().sum(),),
    "kept by an operator of the user's": lambda h: ((_kept(h.detach() + 1).relu() * h).sum(),),
    "another layout": lambda h: ((h + 1 + (h + 2).t()).relu().square().sum(),),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("budget", [1.0, "smallest"])
def test_what_others_look_at_stays(name: str, budget: float | str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.wide = nn.Linear(8, 8), nn.Linear(8, 512)

        def forward(self, x: Tensor) -> Any:
            high = self.wide(x).square().mean()  # both halves have their peaks here, where nothing works in place
            first, *others = HELD[name](self.layer(x) - 0.5)
            return first + high, *others

    torch.manual_seed(0)
    model, x = Model(), torch.randn(8, 8)
    plain = copy.deepcopy(model)
    hybrid = fxhybrid.compile(model, budget=budget, example_inputs=(x,), compression="off")
    KEPT.clear()
    results = [module(x) for module in (plain, hybrid)]
    for again in (True, False):  # the second backward pass finds what is stored as it was
        for loss, *_ in results:
            loss.backward(retain_graph=again)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(plain.layer.weight.grad, model.layer.weight.grad)
    assert all(torch.equal(*pair) for pair in zip(KEPT[::2], KEPT[1::2], strict=True))


def test_only_new_storages_are_overwritten() -> None:
    assert owns_results(aten.add.Tensor)
    assert owns_results(aten.convolution_backward.default)
    for may_return_its_input in (HAND_ON, aten.view.default, aten.contiguous.default, aten.relu_.default):
        assert not owns_results(may_return_its_input)
    assert not owns_results(aten.split.Tensor)  # several results in one storage
    assert not owns_results(aten.col2im.default)  # leaves a storage as large as its input


@pytest.mark.parametrize("divisor", [1, 9])
def test_a_storage_larger_than_its_tensor_is_not_kept(divisor: int) -> None:
    """The kernel of ``fold`` sums columns in a storage as large as all of them, which may live on in the result."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.wide = nn.Conv2d(8, 72, 1), nn.Conv2d(8, 160, 1)

        def forward(self, x: Tensor) -> Tensor:
            folded = F.fold(self.layer(x).flatten(2), (6, 6), 3, padding=1)
            folded = folded if divisor == 1 else folded / divisor
            return self.wide(folded).square().mean()  # where the peak is

    model, x = Folded(), torch.randn(4, 8, 6, 6)
    hybrid = fxhybrid.compile(model, budget=1.0, example_inputs=(x,), compression="off")

    def step() -> None:
        model.zero_grad()
        hybrid(x).backward()

    assert measure_step(step, modules=model, tensors=(x,), repeats=0).peak_bytes == hybrid.plan.peak_bytes
