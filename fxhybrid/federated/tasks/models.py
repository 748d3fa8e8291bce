"""The models of the built-in tasks; any width is a leading corner of the full one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N_BYTES = 256
HEAD_CHANNELS = 8  # of one attention head, at every width, so that a narrow model has fewer whole heads


def scaled(channels: int, width: float) -> int:
    """Channels at a relative width: a multiple of 4, at least 4."""
    return max(4, int(channels * width / 4 + 0.5) * 4)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection, each with batch norm; a shortcut where shapes allow."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        self.shortcut = stride == 1 and n_in == n_out
        self.body = nn.Sequential(
            nn.Conv2d(n_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)  # type: ignore[no-any-return]


class SmallMobileNet(nn.Module):
    """MobileNetV2's blocks at the size of 8 x 8 pixel digits."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        stem, last = scaled(16, width), scaled(64, width)
        layers: list[nn.Module] = [nn.Conv2d(1, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()]
        n_in = stem
        for channels, stride in ((16, 1), (24, 2), (24, 1), (32, 2)):
            n_out = scaled(channels, width)
            layers.append(InvertedResidual(n_in, n_out, stride, expansion=3))
            n_in = n_out
        layers += [nn.Conv2d(n_in, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(last, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Causal attention and a GELU layer, each beside a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        # one layer each: packed into one, a narrow model's would not be a corner of the wide one's
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (_heads(layer(y)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _heads(x: Tensor) -> Tensor:
    batch, length, channels = x.shape
    return x.view(batch, length, channels // HEAD_CHANNELS, HEAD_CHANNELS).transpose(1, 2)


class SmallTransformer(nn.Module):
    """Pre-norm causal transformer blocks over bytes."""

    def __init__(self, width: float = 1.0, *, length: int, n_layers: int = 2) -> None:
        super().__init__()
        channels = max(HEAD_CHANNELS, scaled(32, width) // HEAD_CHANNELS * HEAD_CHANNELS)
        self.tokens = nn.Embedding(N_BYTES, channels)
        self.places = nn.Parameter(torch.randn(length, channels) * 0.02)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, N_BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places)))  # type: ignore[no-any-return]
