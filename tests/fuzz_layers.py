"""The words of the fuzzer's language: layers by the kind of value that they read, each in several variants.

A value is rows (batch, C), a sequence (batch, time, C), a signal (batch, C, time) or an image (batch, C, height,
width); every layer keeps batch and C, so that any layer may follow any other of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

C = 8  # channels of every value
WORDS = 11  # rows of every embedding table


class Context(NamedTuple):
    """Holds what a layer reads besides the value before it."""

    other: Tensor  # an earlier value of the same kind
    words: Tensor  # (batch,) int64 below WORDS
    mask: Tensor  # (batch,) bool


class Fn(nn.Module):
    """A function of the value, the context and own submodules."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.function(x, context, *self.parts)


def plain(*modules: nn.Module) -> Fn:
    """Modules that read the value only, one after another."""
    return Fn(lambda x, _, *parts: run(x, parts), *modules)


def run(x: Tensor, parts: Any) -> Tensor:
    for part in parts:
        x = part(x)
    return x


def of_x(function: Callable[..., Tensor], *modules: nn.Module) -> Fn:
    return Fn(lambda x, _, *parts: function(x, *parts), *modules)


def with_channels_last(function: Callable[..., Tensor], *modules: nn.Module) -> Fn:
    """A function of (batch, ..., C) applied to (batch, C, ...)."""
    return of_x(lambda x, *parts: function(x.movedim(1, -1), *parts).movedim(-1, 1), *modules)


class Table(nn.Module):
    """Free numbers."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) * 0.3)

    def forward(self) -> Tensor:
        return self.w


class Average(nn.Module):
    """A moving average of what it has seen, read before and after the update."""

    average: Tensor
    steps: Tensor

    def __init__(self, style: int) -> None:
        super().__init__()
        self.style = style
        self.register_buffer("average", torch.rand(C))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().reshape(-1, C).mean(0)
        x = x * self.average.sigmoid()
        if self.style == 0:
            self.average.mul_(0.9).add_(mean, alpha=0.1)
        elif self.style == 1:
            self.average.lerp_(mean, 0.5)
        else:
            self.average[: C // 2] = mean[C // 2 :]
        self.steps += 1
        return x - self.average if self.style else x * self.average.exp() / self.steps


def in_place(style: int) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        y = x * 1.5
        if style == 0:
            y.relu_()
            y[:, ::2].mul_(0.5)
        elif style == 1:
            y.view(-1)[::3].add_(1.0)
        elif style == 2:
            y[0] = x[-1] * 2
        elif style == 3:
            y.add_(x).clamp_(-1, 2)
        elif style == 4:
            y.masked_fill_(x > 0.5, 0.1)
        else:
            y.select(1, 0).copy_(x.select(1, 1))
        return y.mul_(0.7)

    return function


def residual(style: int) -> Callable[[Tensor, Context], Tensor]:
    """Joins the value with an earlier one; where sizes differ, with its mean over time or space."""

    def function(x: Tensor, context: Context) -> Tensor:
        other = context.other
        if other.shape != x.shape:
            dims = (2, 3) if x.dim() == 4 else 2 if x.shape[1] == other.shape[1] == C else 1
            other = other.mean(dims, keepdim=True)
        if style == 0:
            return x + other
        if style == 1:
            return x * other.sigmoid()
        if style == 2:
            return torch.maximum(x, other)
        if style == 3:
            return torch.lerp(x, other.expand_as(x), 0.3)
        if style == 4:
            return torch.where(x > other, x, other * 0.5)
        return torch.stack([x, other.expand_as(x)]).mean(0)

    return function


def over_batch(t: Tensor, x: Tensor) -> Tensor:
    """Reshapes (batch,) so that it broadcasts over x."""
    return t.view(-1, *[1] * (x.dim() - 1))


def index(style: int) -> Callable[[Tensor, Context], Tensor]:
    def function(x: Tensor, context: Context) -> Tensor:
        rows = context.words % x.shape[0]
        mask = over_batch(context.mask, x)
        if style == 0:
            return x[rows] + x
        if style == 1:
            return x.index_select(0, rows) * 0.5
        if style == 2:
            return torch.gather(x, 0, over_batch(rows, x).expand_as(x))
        if style == 3:
            return torch.zeros_like(x).index_add(0, rows, x)
        if style == 4:
            return x.scatter_add(0, over_batch(rows, x).expand_as(x), x * 0.5)
        if style == 5:
            return torch.where(mask, x, x.flip(0))
        if style == 6:
            return x.masked_fill(mask, 0.25) + x * mask
        if style == 7:
            return x.index_put((rows,), x * 0.1, accumulate=True)
        values, places = x.topk(2, dim=1)
        return x.scatter(1, places, values.tanh())

    return function


def split(style: int) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        if style == 0:
            a, b = x.chunk(2, 1)
            return torch.cat([a.tanh(), b * a] if a.shape == b.shape else [b, a], 1)
        if style == 1:
            a, b = x.split([1, x.shape[1] - 1], 1)
            return torch.cat([b.sigmoid(), a], 1)
        if style == 2:
            return torch.stack([part.sin() for part in x.unbind(1)][::-1], 1)
        if style == 3:
            a, _ = x.tensor_split(2, 0)
            return F.pad(x, (1, 1)).narrow(-1, 0, x.shape[-1]) + a[:1]
        return torch.cat([x, x.exp().clamp(max=3)], -1).unflatten(-1, (2, -1)).mean(-2)

    return function


def view(style: int) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        if style == 0:
            return x.reshape(-1).sigmoid().view(x.shape)
        if style == 1:
            return x.transpose(0, -1).tanh().transpose(0, -1)
        if style == 2:
            return x.unsqueeze(1).expand(-1, 3, *x.shape[1:]).cumsum(1)[:, 2]
        if style == 3:
            return x.flatten(1).roll(1, 1).view_as(x)
        if style == 4:
            return x.repeat_interleave(2, dim=1)[:, ::2].contiguous().mul(x)
        return x.movedim(0, -1).contiguous().softmax(0).movedim(-1, 0)

    return function


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    partial(nn.ReLU, inplace=True),
    nn.GELU,
    partial(nn.GELU, "tanh"),
    nn.SiLU,
    partial(nn.SiLU, inplace=True),
    partial(nn.ELU, inplace=True),
    partial(nn.LeakyReLU, 0.1, inplace=True),
    nn.Hardtanh,
    partial(nn.ReLU6, inplace=True),
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Mish,
    partial(nn.Hardswish, inplace=True),
    nn.Hardsigmoid,
    partial(nn.CELU, 0.5),
    nn.LogSigmoid,
    nn.PReLU,
    nn.Softsign,
    partial(nn.Softshrink, 0.1),
    partial(nn.Threshold, 0.1, 0.2),
)
POINTWISE: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.clamp(-1, 1),
    lambda x: x.abs().sqrt().mul(x.sign()),
    lambda x: (-x.square()).exp(),
    lambda x: x.sin() * x.cos(),
    lambda x: x / (1 + x.abs()),
    lambda x: F.normalize(x, dim=-1),
    lambda x: x - x.logsumexp(1, keepdim=True),
    lambda x: (x - x.mean(0, keepdim=True)) / (x.std(0, keepdim=True, correction=0) + 1),
    lambda x: x.softmax(-1),
    lambda x: x.log_softmax(1),
    lambda x: x.cumsum(1) * 0.2,
    lambda x: x - x.amax(-1, keepdim=True),
    lambda x: x.sort(dim=1).values,
    lambda x: x + x.detach().square(),
    lambda x: x * torch.rand_like(x),
    lambda x: torch.addcmul(x, x, x, value=0.1),
    lambda x: x * (x > 0),
    lambda x: x.float().pow(2).to(x.dtype),
    lambda x: x * x.shape[0] ** -0.5 + torch.arange(x.shape[-1], dtype=x.dtype),
)
DROPOUTS: tuple[Callable[[], nn.Module], ...] = (
    partial(nn.Dropout, 0.1),
    partial(nn.Dropout, 0.5, inplace=True),
    partial(nn.AlphaDropout, 0.2),
    partial(nn.Dropout, 0.0),
)
ANY: dict[str, tuple[Callable[[], Fn], ...]] = {
    "activation": tuple(lambda make=make: plain(make()) for make in ACTIVATIONS),  # type: ignore[misc]
    "pointwise": tuple(partial(of_x, function) for function in POINTWISE),
    "dropout": tuple(lambda make=make: plain(make()) for make in DROPOUTS),  # type: ignore[misc]
    "in_place": tuple(partial(of_x, in_place(style)) for style in range(6)),
    "residual": tuple(partial(Fn, residual(style)) for style in range(6)),
    "index": tuple(partial(Fn, index(style)) for style in range(9)),
    "split": tuple(partial(of_x, split(style)) for style in range(5)),
    "view": tuple(partial(of_x, view(style)) for style in range(6)),
}


def on_channels(function: Callable[..., Tensor], *makers: Callable[[], nn.Module]) -> tuple[Callable[[], Fn], ...]:
    """A layer over the last dimension, for values that have C there and for those that have it second."""
    return (
        lambda: of_x(function, *(make() for make in makers)),
        lambda: with_channels_last(function, *(make() for make in makers)),
    )


linear = partial(nn.Linear, C, C)
LAST_DIM = {  # name: (for C in the last dimension, for C in the second)
    "linear": on_channels(lambda x, m: m(x), linear),
    "linear without bias": on_channels(lambda x, m: m(x), partial(linear, bias=False)),
    "matmul": on_channels(lambda x, m: x @ m() + m()[0], partial(Table, C, C)),
    "low rank": on_channels(lambda x, a, b: x @ a() @ b(), partial(Table, C, 2), partial(Table, 2, C)),
    "scale": on_channels(lambda x, a, b: x * a() + b(), partial(Table, C), partial(Table, 1)),
    "einsum": on_channels(lambda x, m: torch.einsum("...i,ij->...j", x, m()), partial(Table, C, C)),
    "bilinear": on_channels(lambda x, m: m(x, x.sin()), partial(nn.Bilinear, C, C, C)),
    "glu": on_channels(lambda x, m: F.glu(m(x), -1), partial(nn.Linear, C, 2 * C)),
    "layer norm": on_channels(lambda x, m: m(x), partial(nn.LayerNorm, C)),
    "rms norm": on_channels(lambda x, m: m(x), partial(nn.RMSNorm, C)),
    "norm without weights": on_channels(lambda x, m: m(x), partial(nn.LayerNorm, C, elementwise_affine=False)),
    "weight norm": on_channels(lambda x, m: m(x), lambda: parametrizations.weight_norm(linear())),
    "spectral norm": on_channels(lambda x, m: m(x), lambda: parametrizations.spectral_norm(linear())),
    "average 0": on_channels(lambda x, m: m(x), partial(Average, 0)),
    "average 1": on_channels(lambda x, m: m(x), partial(Average, 1)),
    "average 2": on_channels(lambda x, m: m(x), partial(Average, 2)),
    "checkpoint": on_channels(lambda x, a, b: checkpoint(lambda x: b(a(x)), x, use_reentrant=False), linear, nn.Tanh),
    "batch norm over rows": on_channels(lambda x, m: m(x.reshape(-1, C)).view(x.shape), partial(nn.BatchNorm1d, C)),
}


def embed(x: Tensor, context: Context, table: nn.Embedding) -> Tensor:
    words = table(context.words)
    return x + (words.view(-1, C, *[1] * (x.dim() - 2)) if x.dim() != 3 or x.shape[1] == C else words[:, None])


EMBEDDINGS: tuple[Callable[[], Fn], ...] = tuple(
    partial(lambda options: Fn(embed, nn.Embedding(WORDS, C, **options)), options)
    for options in ({}, {"padding_idx": 0}, {"scale_grad_by_freq": True}, {"max_norm": 1.0})
)
