"""Corrections of fake tensors while a model is traced, and that nothing of them stays behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxhybrid.accuracy.step_result import relative_difference
from fxhybrid.capture.capture import capture
from fxhybrid.capture.fake_tensor_fixes import kernel_norms
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.symbolic import capture_symbolic
from fxhybrid.passes.concretize import SymbolicGraph


class LeftHalf(nn.Module):
    """Writes into a part of a tensor: what is written lies in a storage of the whole tensor's size."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.zeros_like(x)
        whole[:, :2] = x[:, :2] * 3
        return whole


def joint() -> JointGraph:
    return capture(LeftHalf(), (torch.randn(4, 8, requires_grad=True),)).joint


def test_a_part_of_a_storage_counts_the_whole() -> None:
    (written,) = (n.meta["val"] for n in joint().module.graph.nodes if n.name == "copy")
    assert (written.shape, written.stride()) == ((4, 2), (8, 1))
    # 4 x 8 numbers of 4 bytes; the cache would give 3 x 8 + 2 of them, as shape and strides need no more
    assert written.untyped_storage().nbytes() == 128


def test_a_part_of_a_storage_counts_the_whole_with_symbolic_sizes() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    module = LeftHalf()
    symbolic = capture_symbolic(module, (x,), {0: frozenset([0])})
    (name,) = symbolic.sizes(module, x) or {}
    for rows in (4, 6):
        nodes = SymbolicGraph(symbolic.capture.joint).at({name: rows}).module.graph.nodes
        (written,) = (n.meta["val"] for n in nodes if n.name == "copy")
        assert written.untyped_storage().nbytes() == rows * 32


def test_tensors_of_symbolic_sizes_come_from_the_cache_too() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    before = dict(FakeTensorMode.cache_bypasses)
    capture_symbolic(model, (torch.randn(4, 8),), {0: frozenset([0])})
    added = {reason: n - before.get(reason, 0) for reason, n in FakeTensorMode.cache_bypasses.items()}
    assert not added.get("storage is larger than its tensor")


def test_the_cache_of_the_process_is_as_it_was() -> None:
    before, keys = FakeTensorMode.cache, set(FakeTensorMode.cache)
    joint()
    assert FakeTensorMode.cache is before
    assert set(before) == keys


def test_imaginary_parts_count_in_a_difference() -> None:
    # ||(3 + 4i) - 3|| / ||3|| = 4 / 3
    found, expected = {"w": torch.tensor([3 + 4j])}, {"w": torch.tensor([3 + 0j])}
    assert abs(relative_difference(found, expected) - 4 / 3) < 1e-12


def test_one_pixel_has_the_strides_of_the_kernels() -> None:
    """With one pixel, memory in both orders of channels is the same; a wrong guess goes on to whatever resizes it."""
    shape, orders = (4, 6, 1, 1), ((6, 1, 1, 1), (6, 1, 6, 6))  # plain, channels last
    tensors = [torch.randn(24).as_strided(shape, order) for order in orders]
    weight, bias, mean, variance = torch.randn(6), torch.randn(6), torch.zeros(6), torch.ones(6)
    aten = torch.ops.aten

    def strides(x: Tensor, gradient: Tensor, *other: Tensor) -> list[tuple[int, ...]]:
        batch = aten.native_batch_norm(x, *other, True, 0.1, 1e-5)
        group = aten.native_group_norm(x, *other[:2], 4, 6, 1, 2, 1e-5)
        back = aten.native_batch_norm_backward(
            gradient, x, other[0], *other[2:], batch[1], batch[2], True, 1e-5, [True] * 3
        )
        return [t[0].stride() for t in (batch, group, back)]

    with FakeTensorMode() as mode:
        others = [mode.from_tensor(t) for t in (weight, bias, mean, variance)]
    for x in tensors:
        for gradient in tensors:
            expected = strides(x, gradient, weight, bias, mean, variance)
            with mode, kernel_norms():
                assert strides(mode.from_tensor(x), mode.from_tensor(gradient), *others) == expected


class OnePixel(nn.Module):
    """A convolution in channels_last whose result has one pixel: both contiguous and channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return torch.relu(h) + h


def test_results_of_one_pixel_have_the_kernels_strides() -> None:
    model, x = OnePixel(), torch.randn(2, 3, 4, 4)
    graph = capture(model, (x,)).joint.module.graph
    nodes = {n.name: n.meta["val"].stride() for n in graph.nodes if n.name in ("convolution", "relu", "add")}
    h = model.conv(x)
    assert nodes["convolution"] == h.stride() == (4, 1, 4, 4)
    assert nodes["relu"] == torch.relu(h).stride() == (4, 1, 1, 1)
    assert nodes["add"] == (torch.relu(h) + h).stride()
