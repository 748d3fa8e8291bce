"""Operators whose kernels lay results out as no tracer says: bit-equal to eager at any budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxhybrid.capture.native_operators import REPLACED
from tests.compare import twins
from tests.operator_parts import Head, N, check, rows, symmetric

ATEN = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
OVERLAID: dict[str, Callable[[Tensor], Tensor]] = {
    "last columns": lambda h: h[:, -3:],
    "every second column": lambda h: h[:, ::2],
    "transposed": lambda h: h.t()[:3],
    "expanded": lambda h: h[:1].expand(4, N),
    "windows": lambda h: h.unfold(1, 4, 2),
    "bytes that overlap": lambda h: h.as_strided((4, 4), (1, 1)),
    "nothing": lambda h: h[:0],
}


@pytest.mark.parametrize("name", OVERLAID)
def test_outputs_with_strides_of_their_own(name: str) -> None:
    """With and without a gradient of theirs."""
    check(Head(lambda h: (h.square().mean(), OVERLAID[name](h))), rows(), every=(True, False))


PREDICATES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda h: h.max(),
    "min": lambda h: h.min(),
    "median": lambda h: h.median(),
    "nan_to_num": lambda h: torch.nan_to_num(h).sum(),
    "cumprod": lambda h: h.cumprod(1).sum(),
    "scale by the largest": lambda h: (h / h.abs().max()).square().sum(),
    "scatter_reduce": lambda h: h.scatter_reduce(1, torch.zeros(4, N, dtype=torch.long), h, "prod").sum(),
}


@pytest.mark.parametrize("name", PREDICATES)
def test_several_predicates_of_one_tensor(name: str) -> None:
    check(Head(PREDICATES[name]), rows())


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "same": lambda: nn.Conv2d(4, 4, 3, padding="same"),
    "same, dilated": lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2),
}
ONE_NUMBER = ({"stride": 2}, {"padding": 1}, {"dilation": 2}, {"stride": (2, 1), "padding": "valid"})


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_with_named_padding(name: str) -> None:
    check(nn.Sequential(nn.Conv2d(3, 4, 1), CONVOLUTIONS[name]()), rows(2, 3, 8, 8))


@pytest.mark.parametrize("arguments", ONE_NUMBER, ids=str)
def test_convolutions_with_one_number_for_two_dimensions(arguments: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.first(x), self.second.weight, **arguments)

    check(Net(), rows(2, 3, 9, 8))


DECOMPOSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "inv": lambda h: torch.linalg.inv(symmetric(h)),
    "solve": lambda h: torch.linalg.solve(symmetric(h), h.T),
    "cholesky": lambda h: torch.linalg.cholesky(symmetric(h)),
    "lu_factor": lambda h: torch.linalg.lu_factor(symmetric(h))[0],
    "det": lambda h: torch.linalg.det(symmetric(h) / N),
    "slogdet": lambda h: torch.linalg.slogdet(symmetric(h))[1],
    "eigh": lambda h: torch.linalg.eigh(symmetric(h))[0],
    "two of them": lambda h: torch.linalg.cholesky(symmetric(h)) @ torch.linalg.inv(symmetric(h)),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_linear_algebra(name: str) -> None:
    check(Head(DECOMPOSITIONS[name]), rows())


def test_linear_algebra_still_raises() -> None:
    """The check for a singular matrix runs in the planned graph too."""
    pair = twins(Head(lambda h, scale: torch.linalg.inv(h.T @ h * scale)))
    pair.hybrid(rows(N, N), torch.ones(()))
    with pytest.raises(torch.linalg.LinAlgError):
        pair.hybrid(rows(N, N), torch.zeros(()))


NORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "BatchNorm1d": (partial(nn.BatchNorm1d, N), 3),
    "BatchNorm2d": (partial(nn.BatchNorm2d, N), 4),
    "BatchNorm3d": (partial(nn.BatchNorm3d, N), 5),
    "InstanceNorm1d": (partial(nn.InstanceNorm1d, N), 3),
    "GroupNorm": (partial(nn.GroupNorm, 4, N), 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_transposed_inputs(name: str) -> None:
    """Kernels give contiguous results there, which ``reshape`` copies and does not view."""
    make, n_dims = NORMS[name]

    def function(h: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        back = norm(h.transpose(1, -1)).transpose(1, -1)
        return back.reshape(-1, N), back.flatten(1)

    check(Head(function, make()), rows(6, *range(2, n_dims), N))


def test_layer_norms_of_transposed_inputs() -> None:
    def function(h: Tensor, *norms: nn.LayerNorm) -> list[Tensor]:
        return [norm(h.to(norm.weight.dtype).transpose(1, 2)).transpose(1, 2).reshape(-1, N) for norm in norms]

    check(Head(function, *(nn.LayerNorm(4, dtype=dtype) for dtype in LOW)), rows(6, 4, N))


LOW = (torch.bfloat16, torch.float16)
LOW_PRECISION: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": partial(nn.GroupNorm, 4, N),
    "BatchNorm2d": partial(nn.BatchNorm2d, N),
    "InstanceNorm2d": partial(nn.InstanceNorm2d, N, affine=True),
    "LayerNorm": partial(nn.LayerNorm, (N, 8, 8)),
}


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_float32_norms_of_low_precision_inputs(name: str) -> None:
    def function(h: Tensor, *norms: nn.Module) -> list[Tensor]:
        images = h.transpose(1, 3)
        return [norm(images.to(dtype)).float() for norm, dtype in zip(norms, LOW, strict=True)]

    check(Head(function, *(LOW_PRECISION[name]() for _ in LOW)), rows(2, 8, 8, N))


@pytest.mark.parametrize("transform", [torch.fft.rfft2, torch.fft.fft], ids=lambda f: f.__name__)
def test_sizes_do_not_depend_on_earlier_captures(transform: Callable[[Tensor], Tensor]) -> None:
    """A result smaller than its storage counts with its storage, at the second planning as at the first."""
    model = Head(lambda h: torch.fft.irfft2(transform(h)[:, :, :3]).square())
    sizes = [
        [t.size_bytes for t in twins(model, example_inputs=(rows(2, 8, N),)).hybrid.planning_problem.tensors]
        for _ in range(2)
    ]
    assert sizes[0] == sizes[1]


class Resized(nn.Module):
    """Resizes what a convolution gives, in each of torch's ways."""

    def __init__(self, n_dims: int, options: list[dict[str, Any]]) -> None:
        super().__init__()
        self.first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n_dims](2, 4, 3)
        self.options = options

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.interpolate(self.first(x), **options) for options in self.options]


LARGER: list[dict[str, Any]] = [{"size": 7}, {"scale_factor": 1.7}, {"scale_factor": 2, "recompute_scale_factor": True}]
NEAREST: list[dict[str, Any]] = [{**o, "mode": mode} for o in LARGER for mode in ("nearest", "nearest-exact")]
CORNERS = (True, False)
MODES = {
    1: [*NEAREST, *({**o, "mode": "linear", "align_corners": c} for o in LARGER for c in CORNERS)],
    2: [
        *NEAREST,
        *({**o, "mode": m, "align_corners": c} for o in LARGER for m in ("bilinear", "bicubic") for c in CORNERS),
        *({**LARGER[0], "mode": m, "antialias": True} for m in ("bilinear", "bicubic")),
    ],
    3: [*NEAREST, *({**o, "mode": "trilinear", "align_corners": c} for o in LARGER for c in CORNERS)],
}


@pytest.mark.parametrize("n_dims", MODES)
def test_resizing(n_dims: int) -> None:
    """By eager's kernels, not by a decomposition that rounds in another way."""
    x = rows(2, 2, *[6] * n_dims)
    check(Resized(n_dims, MODES[n_dims]), x)
    if n_dims == 2:
        check(Resized(2, MODES[2]).to(memory_format=torch.channels_last), x)  # type: ignore[call-overload]


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "addcdiv": lambda h: torch.addcdiv(h, h.sin(), h.exp(), value=0.3),
    "addcdiv_": lambda h: (h * 1).addcdiv_(h.sin(), h.exp(), value=0.3),
    "addcmul_": lambda h: (h * 1).addcmul_(h.sin(), h.exp(), value=0.3),
    "multi_margin_loss": lambda h: F.multi_margin_loss(h, torch.tensor([1, 3, 2, 0])),
    "multilabel_margin_loss": lambda h: F.multilabel_margin_loss(h, torch.arange(N).expand(4, N) - 1),
    "shrinks in bfloat16": lambda h: F.softshrink((h[:, :, None] * h[:, None]).bfloat16(), 0.1),
    "masked_fill by a mean": lambda h: h.masked_fill(h > 0, h.mean()) + h.masked_fill(h[:, :1] > 0, h.sum()),
    "prod": lambda h: h.prod() + h[:2].prod(0).sum() + h.cos().prod(1, keepdim=True) + h.relu().prod(1).sum(),
    "rrelu of a transposed tensor": lambda h: F.rrelu(h.t(), training=True),
    "bernoulli of a transposed tensor": lambda h: torch.bernoulli(h.t().detach(), 0.4) * h.t(),
    "bernoulli of every second column": lambda h: h.detach()[:, ::2].bernoulli(0.4) * h[:, ::2],
}


@pytest.mark.parametrize("name", WHOLE)
def test_operators_that_are_traced_whole(name: str) -> None:
    check(Head(WHOLE[name]), rows())


ELSEWHERE = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}  # traced in a way of their own


def test_no_other_operator_is_taken_apart() -> None:
    """Torch may give an operator with a kernel a decomposition that the tracer would follow, and eager would not."""
    taken_apart = set()
    for name, overload in (full.split("::")[1].partition(".")[::2] for full in ATEN):
        op = getattr(getattr(torch.ops.aten, name), overload or "default")
        has_kernel = not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        if has_kernel and torch._C.DispatchKey.Autograd in op.py_kernels:
            taken_apart.add(op)
    assert len(taken_apart) >= 10, "torch names its kernels in another way by now"
    assert {op for op in taken_apart if op._opname not in ELSEWHERE} <= REPLACED.keys()
