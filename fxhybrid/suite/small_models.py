"""Small models that demo, federated tasks and benchmarks train on the sample data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxhybrid.suite.convnets import InvertedResidual, conv_bn_relu6
from fxhybrid.suite.sample_data import Batch

N_BYTES = 256
HEAD_CHANNELS = 8  # of an attention head in ``nested_transformer``, at every width: a narrow model has fewer heads


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Makes a model with the weights of a seed; leaves the global random state as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def next_byte_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Computes the mean cross entropy over all positions; logits (batch, length, 256), target (batch, length)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class HeldOutScore:
    """Says how good a model is on held-out data.

    Attributes:
        loss: mean over all predictions.
        n_right: right predictions.
        n_predictions: all of them.
    """

    loss: float
    n_right: int
    n_predictions: int

    @property
    def accuracy(self) -> float:
        """Returns the share of right predictions."""
        return self.n_right / self.n_predictions


def evaluate(model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], batches: Iterable[Batch]) -> HeldOutScore:
    """Scores class scores (..., classes) against class ids (...) in evaluation mode; restores the model's mode."""
    was_training = model.training
    model.eval()
    loss, n_right, n_predictions = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            output = model(inputs)
            loss += float(loss_fn(output, targets)) * targets.numel()
            n_right += int((output.argmax(-1) == targets).sum())
            n_predictions += targets.numel()
    model.train(was_training)
    return HeldOutScore(loss / n_predictions, n_right, n_predictions)


class DigitsNet(nn.Module):
    """Classifies 8 x 8 images: two stages of 3 x 3 convolutions with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 1
        for width in (24, 24, 24, 24, 24, 48, 48, 48):
            if width > n_in > 1:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(n_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            n_in = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(n_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class SmallMobileNet(nn.Module):
    """Classifies 8 x 8 images by MobileNetV2's blocks; any width is a leading slice of the full model."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        stem, last = scaled(16, width), scaled(64, width)
        layers: list[nn.Module] = [conv_bn_relu6(1, stem, 3)]
        n_in = stem
        for channels, stride in ((16, 1), (24, 2), (24, 1), (32, 2)):
            n_out = scaled(channels, width)
            layers.append(InvertedResidual(n_in, n_out, stride, expand=3))
            n_in = n_out
        self.features = nn.Sequential(*layers, conv_bn_relu6(n_in, last, 1))
        self.head = nn.Linear(last, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def scaled(channels: int, width: float) -> int:
    """Scales channels to a relative width: a multiple of 4, at least 4."""
    return max(4, int(channels * width / 4 + 0.5) * 4)


class CausalBlock(nn.Module):
    """Applies causal attention and a GELU layer, each in addition to a residual connection."""

    def __init__(self, width: int, n_heads: int, *, is_packed: bool) -> None:
        """Makes the layers.

        Args:
            width: channels, a multiple of ``n_heads``.
            n_heads: attention heads.
            is_packed: query, key and value are one layer, as in GPT-2; else three, whose leading slices are those
                of a narrower block.
        """
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        sizes = [3 * width] if is_packed else [width] * 3
        self.qkv = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self._heads(self.norm1(x)), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects to query, key and value, each (batch, heads, length, channels of a head)."""
        batch, length, width = x.shape
        shape = (batch, length, self.n_heads, width // self.n_heads)
        if len(self.qkv) == 1:
            heads = self.qkv[0](x).view(batch, length, 3, *shape[2:])
            q, k, v = heads.permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in self.qkv)
        return q, k, v


class ByteTransformer(nn.Module):
    """Reads bytes through pre-norm causal blocks; predicts each next byte, or one class for the whole piece."""

    def __init__(
        self,
        *,
        width: int,
        n_heads: int,
        n_layers: int,
        length: int = 128,
        n_classes: int | None = None,
        is_packed: bool = True,
    ) -> None:
        """Makes the layers.

        Args:
            width: channels.
            n_heads: attention heads of a block.
            n_layers: blocks.
            length: bytes of a piece.
            n_classes: classes of the whole piece; None to predict each next byte.
            is_packed: see ``CausalBlock``.
        """
        super().__init__()
        self.is_classifier = n_classes is not None
        self.tokens = nn.Embedding(N_BYTES, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(CausalBlock(width, n_heads, is_packed=is_packed) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes or N_BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(ids) + self.places))
        return self.head(x.mean(1) if self.is_classifier else x)  # type: ignore[no-any-return]


def language_model() -> ByteTransformer:
    """Makes the demo's model: three blocks over 128 bytes."""
    return ByteTransformer(width=96, n_heads=4, n_layers=3)


def nested_transformer(width: float = 1.0, *, length: int) -> ByteTransformer:
    """Makes a model of two blocks at a relative width; any width is a leading slice of the full model."""
    channels = max(HEAD_CHANNELS, scaled(32, width) // HEAD_CHANNELS * HEAD_CHANNELS)
    n_heads = channels // HEAD_CHANNELS
    return ByteTransformer(width=channels, n_heads=n_heads, n_layers=2, length=length, is_packed=False)
