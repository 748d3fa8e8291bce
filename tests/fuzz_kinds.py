"""Layers that only one kind of value has, and those that lead from one kind to another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz_layers import ANY, EMBEDDINGS, LAST_DIM, WORDS, C, Context, Fn, Table, of_x, plain

Make = Callable[[], Fn]
HEADS = 2


class Attention(nn.Module):
    """Attention over time, written with one of torch's ways to do it."""

    def __init__(self, style: int) -> None:
        super().__init__()
        self.style = style
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=style != 1), nn.Linear(C, C)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        keep = context.mask[:, None, None, None] | torch.eye(x.shape[1], dtype=torch.bool)
        if self.style == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.style == 1:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        elif self.style == 2:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        elif self.style == 3:
            y = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        elif self.style == 4:
            y = (q @ k.mT * 0.5).masked_fill(~keep, -1e4).softmax(-1) @ v
        else:
            weights = torch.einsum("bhtd,bhsd->bhts", q, k).tril().softmax(-1)
            y = torch.einsum("bhts,bhsd->bhtd", F.dropout(weights, 0.1), v)
        return self.out(y.transpose(1, 2).flatten(2))


def multihead(style: int) -> Fn:
    module = nn.MultiheadAttention(C, HEADS, dropout=0.1 * (style == 1), batch_first=True, add_zero_attn=style == 3)

    def function(x: Tensor, context: Context, attend: nn.Module) -> Tensor:
        options: dict[str, Any] = {"need_weights": style in (0, 3)}
        if style == 2:
            options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x.dtype)}
        if style == 1:
            options |= {"key_padding_mask": context.mask[:, None] & (torch.arange(x.shape[1]) > 0)}
        y, weights = attend(x, x.flip(1), x, **options)
        return y if weights is None else y + weights.mean(-1, keepdim=True)

    return Fn(function, module)


def encoder(style: int) -> Fn:
    options = {
        "norm_first": bool(style),
        "activation": "gelu" if style else "relu",
        "dropout": 0.1,
        "batch_first": True,
    }
    return plain(nn.TransformerEncoderLayer(C, HEADS, 2 * C, **options))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Make:
    def function(x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x.transpose(0, 1))[0].transpose(0, 1)
        return y[..., :C] + y[..., C:] if options.get("bidirectional") else y

    return lambda: of_x(function, kind(C, C, **options))


def cell(kind: type[nn.RNNCellBase]) -> Make:
    def function(x: Tensor, step: nn.Module) -> Tensor:
        state = step(x)
        state = step(x.tanh(), state)
        return state[0] * state[1].sigmoid() if isinstance(state, tuple) else state

    return lambda: of_x(function, kind(C, C))


def layers(*makers: Callable[[], nn.Module]) -> tuple[Make, ...]:
    return tuple(lambda make=make: plain(make()) for make in makers)  # type: ignore[misc]


def functions(*found: Callable[[Tensor], Tensor]) -> tuple[Make, ...]:
    return tuple(partial(of_x, function) for function in found)


def at_least(size: int, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function where time or space are large enough for it, else the value itself."""
    return lambda x: function(x) if min(x.shape[2:]) >= size else x


def excite(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return x * b(F.relu(a(F.adaptive_avg_pool2d(x, 1)), inplace=True)).sigmoid()


def windows(x: Tensor) -> Tensor:
    cut = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2].unfold(2, 2, 2).unfold(3, 2, 2)
    return cut.softmax(-1).amax(-1).mean(-1)


def unpool(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, places, 2, output_size=x.shape[2:])


conv1d, conv2d = partial(nn.Conv1d, C, C), partial(nn.Conv2d, C, C)
up1d, up2d = partial(nn.ConvTranspose1d, C, C), partial(nn.ConvTranspose2d, C, C)
NORMS = (
    partial(nn.GroupNorm, 2, C),
    partial(nn.GroupNorm, C, C, affine=False),
    partial(nn.GroupNorm, 1, C),
)
ROWS: dict[str, tuple[Make, ...]] = {
    "batch norm": layers(
        partial(nn.BatchNorm1d, C),
        partial(nn.BatchNorm1d, C, affine=False),
        partial(nn.BatchNorm1d, C, momentum=0.3, track_running_stats=False),
    ),
    "cell": (cell(nn.GRUCell), cell(nn.LSTMCell), cell(nn.RNNCell)),
    "outer": functions(
        lambda x: torch.einsum("bi,bj->bij", x, x.tanh()).mean(-1),
        lambda x: torch.bmm(x[:, None], x[:, :, None] * x[:, None]).squeeze(1),
        lambda x: (x @ x.T / C).softmax(-1) @ x,
        lambda x: torch.cdist(x, x[:3] + 1) @ x[:3],
    ),
    "bag": (lambda: Fn(lambda x, c, t: x + t(c.words[:, None]), nn.EmbeddingBag(WORDS, C, mode="sum")),),
    "to sequence": (
        lambda: of_x(lambda x, m: m(x).unflatten(-1, (3, C)), nn.Linear(C, 3 * C)),
        lambda: of_x(lambda x, t: x[:, None] + t(), Table(4, C)),
    ),
}
SEQUENCE: dict[str, tuple[Make, ...]] = {
    "attention": tuple(partial(lambda s: Fn(lambda x, c, m: m(x, c), Attention(s)), s) for s in range(6)),
    "multihead": tuple(partial(multihead, style) for style in range(4)),
    "encoder": (partial(encoder, 0), partial(encoder, 1)),
    "recurrent": (
        recurrent(nn.GRU),
        recurrent(nn.LSTM),
        recurrent(nn.GRU, bidirectional=True),
        recurrent(nn.LSTM, num_layers=2, dropout=0.2),
        recurrent(nn.RNN),
    ),
    "time": functions(
        lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1] + x,
        lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x.dtype)[:, None],
        lambda x: x[:, torch.arange(x.shape[1]).flip(0)],
        lambda x: x.softmax(1),
    ),
    "to rows": functions(
        lambda x: x.mean(1), lambda x: x[:, -1], lambda x: x.amax(1), lambda x: x.max(1).values, lambda x: x.sum(1)
    ),
    "to signal": functions(lambda x: x.transpose(1, 2), lambda x: x.mT.contiguous()),
}
SIGNAL: dict[str, tuple[Make, ...]] = {
    "convolution": layers(
        partial(conv1d, 3, padding=1),
        partial(conv1d, 1, bias=False),
        partial(conv1d, 3, padding=2, stride=2),
        partial(conv1d, 3, padding="same", groups=C),
        partial(conv1d, 3, padding=4, dilation=2, groups=2),
        partial(up1d, 2, stride=2),
        partial(up1d, 3, padding=1, groups=4),
    ),
    "norm": layers(
        partial(nn.BatchNorm1d, C),
        partial(nn.InstanceNorm1d, C, eps=1e-2),
        partial(nn.InstanceNorm1d, C, affine=True, track_running_stats=True, eps=1e-2),
        *NORMS,
    ),
    "pool": functions(
        at_least(2, lambda x: F.max_pool1d(x, 2)),
        at_least(2, lambda x: F.avg_pool1d(x, 2, ceil_mode=True)),
        lambda x: F.adaptive_avg_pool1d(x, 3),
        lambda x: F.adaptive_max_pool1d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        at_least(2, lambda x: F.lp_pool1d(x.abs() + 0.1, 2, 2)),
    ),
    "to rows": functions(lambda x: x.mean(-1), lambda x: F.adaptive_max_pool1d(x, 1).flatten(1), lambda x: x[..., 0]),
    "to sequence": functions(lambda x: x.transpose(1, 2)),
}
IMAGE: dict[str, tuple[Make, ...]] = {
    "convolution": layers(
        partial(conv2d, 3, padding=1),
        partial(conv2d, 1),
        partial(conv2d, 1, bias=False),
        partial(conv2d, 3, stride=2, padding=1, bias=False),
        partial(conv2d, 3, padding=1, groups=C),
        partial(conv2d, (1, 3), padding="same", dilation=2),
        partial(conv2d, 3, padding=1, groups=2),
        partial(conv2d, 3, padding=1, padding_mode="circular"),
    ),
    "transposed": layers(
        partial(up2d, 2, stride=2), partial(up2d, 3, padding=1), partial(up2d, 3, stride=2, padding=1, groups=2)
    ),
    "norm": layers(
        partial(nn.BatchNorm2d, C),
        partial(nn.BatchNorm2d, C, affine=False),
        partial(nn.InstanceNorm2d, C, eps=1e-2),
        partial(nn.InstanceNorm2d, C, affine=True, track_running_stats=True, eps=1e-2),
        *NORMS,
    ),
    "pool": functions(
        at_least(2, lambda x: F.max_pool2d(x, 2)),
        lambda x: F.max_pool2d(x, 3, 1, 1),
        at_least(2, lambda x: F.avg_pool2d(x, 2, ceil_mode=True)),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
        lambda x: F.adaptive_max_pool2d(x, 2),
        at_least(2, unpool),
        at_least(2, windows),
    ),
    "resize": functions(
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2),
        at_least(2, lambda x: F.pad(x, (1, 0, 1, 1), mode="reflect")),
        lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1) / 9,
    ),
    "interpolate": functions(lambda x: F.interpolate(x, size=(5, 4), mode="bilinear", align_corners=False)),
    "excite": (lambda: of_x(excite, conv2d(1), conv2d(1)),),
    "drop channels": layers(nn.Dropout2d, partial(nn.FeatureAlphaDropout, 0.1)),
    "to sequence": functions(lambda x: x.flatten(2).transpose(1, 2)),
    "to signal": functions(lambda x: x.mean(2), lambda x: x.flatten(2)),
    "to rows": functions(
        lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.amax((-1, -2))
    ),
}


def vocabulary(own: dict[str, tuple[Make, ...]], last: bool) -> dict[str, tuple[Make, ...]]:
    """All layers of a kind; ``last`` says whether C is its last dimension."""
    dense = {name: (makers[0 if last else 1],) for name, makers in LAST_DIM.items()}
    return {**ANY, **dense, "embedding": EMBEDDINGS, **own}


LAYERS: dict[str, dict[str, tuple[Make, ...]]] = {
    "rows": vocabulary(ROWS, last=True),
    "sequence": vocabulary(SEQUENCE, last=True),
    "signal": vocabulary(SIGNAL, last=False),
    "image": vocabulary(IMAGE, last=False),
}
