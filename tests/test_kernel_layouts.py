"""Strides of fake results are those of the CPU kernels, for operands in any layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxhybrid.capture import kernel_layouts
from fxhybrid.capture.tracing_settings import tracing_settings
from tests.compare import twins
from tests.operator_parts import Head, N, check, rows

aten = torch.ops.aten
SHAPE = (2, 3, 4, 5)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_loss_backward": lambda a, b: aten.mse_loss_backward(a, a, b, 0),
    "smooth_l1_loss_backward": lambda a, b: aten.smooth_l1_loss_backward(a, a, b, 0, 1.0),
    "huber_loss_backward": lambda a, b: aten.huber_loss_backward(a, a, b, 0, 1.0),
    "log_softmax": lambda a, b: aten._log_softmax_backward_data(a, b, 1, torch.float32),
    "glu_backward": lambda a, b: aten.glu_backward(a[:, :, :2], b, 2),
    "power of a number": lambda a, b: aten.pow.Scalar(2, a),
    "roll": lambda a, b: a.roll(1, 1),
    "native_dropout_backward": lambda a, b: aten.native_dropout_backward(a, b > 0.5, 1.25),
    "elu_backward": lambda a, b: aten.elu_backward(a, 1.0, 1.0, 1.0, False, b),
    "hardtanh_backward": lambda a, b: aten.hardtanh_backward(a, b, -1.0, 1.0),
    "hardswish_backward": aten.hardswish_backward,
    "hardsigmoid_backward": aten.hardsigmoid_backward,
    "softplus_backward": lambda a, b: aten.softplus_backward(a, b, 1.0, 20.0),
    "logit_backward": lambda a, b: aten.logit_backward(a, b, None),
    "rrelu_with_noise_backward": lambda a, b: aten.rrelu_with_noise_backward(a, b, b, 0.1, 0.3, True, False),
    "xlogy": torch.xlogy,
    "log_sigmoid_forward": lambda a, b: aten.log_sigmoid_forward(a)[0],
    "nll_loss2d_forward": lambda a, b: aten.nll_loss2d_forward(a, b[:, 0].long(), None, 0, -100)[0],
    "channel_shuffle": lambda a, b: F.channel_shuffle(a, 3),
    "max_unpool2d": lambda a, b: aten.max_unpool2d(a, b.long(), (8, 10)),
    "reflection_pad2d_backward": lambda a, b: aten.reflection_pad2d_backward(a, b[:, :, :2, :3], (1, 1, 1, 1)),
    "replication_pad2d_backward": lambda a, b: aten.replication_pad2d_backward(a, b[:, :, :2, :3], (1, 1, 1, 1)),
    "copysign": lambda a, b: a.copysign(b[0]),
    "rounding division": lambda a, b: torch.div(a, b[0], rounding_mode="floor"),
    "ldexp": lambda a, b: torch.ldexp(a, b[0]),
    "logaddexp": lambda a, b: torch.logaddexp(a[:, :, :1], b[0]),
    "binary_cross_entropy": lambda a, b: aten.binary_cross_entropy(a.clamp(0.1, 0.9), b.clamp(0.1, 0.9), None, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_fake_strides(name: str) -> None:
    call, made = CALLS[name], torch.rand(2, *SHAPE) + 0.1
    with tracing_settings():
        for first, second in itertools.product(LAYOUTS, LAYOUTS):
            a, b = LAYOUTS[first](made[0]), LAYOUTS[second](made[1])
            with FakeTensorMode() as mode:
                fake = call(mode.from_tensor(a), mode.from_tensor(b))
            assert fake.stride() == call(a, b).stride(), (first, second)


def test_reshapes_behind_them() -> None:
    """Views of gradients, which no kernel would take if the strides were wrong."""

    def function(h: Tensor, target: Tensor) -> Tensor:
        turned = h.reshape(4, 4, 2, N // 2).transpose(1, 2)
        lost = F.mse_loss(h.transpose(1, 2), target)
        found = [F.dropout(turned, 0.1), F.elu(turned), F.hardtanh(turned), F.softplus(turned), turned.roll(1, 1)]
        return lost + torch.stack([t.reshape(-1, N).square().mean() for t in found]).sum()

    check(Head(function), rows(4, 4, N), rows(4, N, 4))


CHOSEN = torch.tensor([0, 2])
IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "masked_fill": lambda t: t.masked_fill_(t > 0.5, 0.1),
    "masked_fill of a slice": lambda t: t[:, :, 1:].masked_fill_(t[:, :, 1:] > 0.5, 0.1),
    "masked_scatter": lambda t: t.masked_scatter_(t > 0.5, t * 2),
    "scatter": lambda t: t.scatter_(1, CHOSEN.expand(4, 6, 2).movedim(-1, 1), 0.5),
    "scatter_add": lambda t: t.scatter_add_(1, CHOSEN.expand(4, 6, 2).movedim(-1, 1), t[:, :2] * 2),
    "index_add": lambda t: t.index_add_(1, CHOSEN, t[:, :2] * 2),
    "index_copy": lambda t: t.index_copy_(1, CHOSEN, t[:, :2] * 2),
    "cumsum": lambda t: t.cumsum_(1),
    "cumprod": lambda t: t.cumprod_(1),
    "tril": lambda t: t.tril_(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_changed_in_place_keeps_its_strides(name: str) -> None:
    def function(h: Tensor) -> tuple[Tensor, Tensor]:
        turned = h.transpose(1, 2).clone()
        IN_PLACE[name](turned)
        return turned * 2, turned.transpose(1, 2).reshape(-1, N).mean(0)

    model = Head(function)
    expected = model(rows(4, 6, N))[0]
    assert not expected.is_contiguous()
    check(model, rows(4, 6, N))


def test_gradients_that_autograd_fills_in_place() -> None:
    """The gradient of a maximum is filled in place, in the layout of its operands."""

    def function(h: Tensor) -> Tensor:
        turned = h.transpose(1, 2)
        return torch.maximum(turned, turned.flip(2))

    check(Head(function), rows(4, 6, N))


@pytest.mark.parametrize("batches", [(48,), (48, 24, 12)], ids=["one size", "many sizes"])
def test_strides_along_one_element_reach_the_next_convolution(batches: tuple[int, ...]) -> None:
    """Kernels of convolutions are chosen by them, and round in other ways."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    pair = twins(net, compression="lossless")
    seen: list[tuple[int, ...]] = []
    pair.plain[3].register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    for batch in batches:
        x = torch.randn(batch, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        pair.same(lambda model, x=x: model(x).square().mean().backward())
    *_, convolution = pair.hybrid.forward_graph.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert convolution.args[0].meta["val"].stride() == seen[-1] == (8, 1, 8, 8)


@pytest.mark.parametrize("op", kernel_layouts._FOLLOWS_GRADIENT, ids=str)
def test_fake_gradients_of_interpolations_at_symbolic_sizes(op: torch._ops.OpOverload) -> None:
    (n,) = (int(c) for c in str(op) if c.isdigit())
    is_aligned = (False,) * ("align_corners" in [argument.name for argument in op._schema.arguments])
    size, large = (2, 3, *(4, 5, 6)[:n]), tuple(2 * s for s in (4, 5, 6)[:n])
    for gradient in (torch.rand(2, 3, *large), torch.rand(2, *large, 3).movedim(-1, 1)):
        with tracing_settings():
            mode = FakeTensorMode(shape_env=ShapeEnv())
            fake = mode.from_tensor(gradient, static_shapes=False)
            sizes = (fake.shape[0], 3, *(s // 2 for s in fake.shape[2:]))
            found = op(fake, large, sizes, *is_aligned)
        expected = op(gradient, large, size, *is_aligned)
        assert tuple(map(int, found.shape)) == expected.shape
        assert tuple(map(int, found.stride())) == expected.stride()
