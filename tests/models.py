"""Small models that between them use what real models use, and one batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils import checkpoint
from transformers.utils import ModelOutput

ROWS, WIDTH = 96, 48  # 18 KiB an activation: large enough for every codec


@dataclass
class Batch:
    """Arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def rows(n: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width)


def mlp(dropout: float = 0.0, depth: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))


class TiedWeights(nn.Module):
    """Embedding and output layer share one weight, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.body = mlp()
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words)))


class Unused(nn.Module):
    """One parameter nobody reads, one that only an output without gradient reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.idle, self.watched = mlp(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), self.watched(x).detach()


class TwoInTwoOut(nn.Module):
    """Two towers; each output depends on its own tower only."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(), mlp()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(a), self.right(b)


class Dicts(nn.Module):
    """A dict goes in, a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> dict[str, Any]:
        out = self.body(batch["x"] + batch["y"]) * scale
        return {"logits": out, "parts": [out.sum(1), {"mean": out.mean()}], "size": out.shape[0]}


@dataclass
class Heads(ModelOutput):
    """A Hugging Face output."""

    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    nothing: Tensor | None = None


@dataclass
class Pair:
    """A plain dataclass as an output."""

    first: Tensor
    second: Tensor


class HuggingFaceOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = mlp(), mlp()

    def forward(self, x: Tensor) -> Heads:
        hidden = self.lower(x)
        return Heads(logits=self.upper(hidden), hidden=(x, hidden))


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = mlp(), mlp()

    def forward(self, x: Tensor) -> Pair:
        hidden = self.lower(x)
        return Pair(self.upper(hidden), hidden)


class Constants(nn.Module):
    """Behaviour chosen by bool, int, str and None arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, repeat: int, flip: bool, mode: str = "mean", mask: Tensor | None = None) -> Tensor:
        for _ in range(repeat):
            x = self.body(x)
        x = -x if flip else x
        x = x if mask is None else x * mask
        return x.mean(1) if mode == "mean" else x.sum(1)


class InPlace(nn.Module):
    """Activations changed in place, also through views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        y = self.b(x).add_(x)
        y[:, : WIDTH // 2].mul_(2.0)
        y.view(-1)[::3].add_(1.0)
        z = self.c(y.relu_())
        z[0] = y[1]
        return F.dropout(z, 0.3, self.training, inplace=True)


class BatchNorms(nn.Module):
    """Convolutions, batch norms, pooling: buffers that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class MovingAverage(nn.Module):
    """Reads its buffer before and after it is updated: each reader needs the contents of its own time."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x) * self.average.clone())
        self.average.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        x = torch.tanh(self.b(x) * self.average.exp())
        self.average.lerp_(x.detach().mean(0), 0.5)
        return x * self.average.sigmoid()


class WritesToInput(nn.Module):
    """Changes an input that needs no gradient, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.count = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x * 1.5)
        x.mul_(0.5)
        self.count.add_(out.detach().sum(0))
        return self.body(out + x) * self.count


class Aliases(nn.Module):
    """Outputs that are an input, a view of one, and views of one intermediate."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.body(x)
        return y, y.view(-1), y[:3], x, x.t()


class DetachedViews(nn.Module):
    """Outputs that are a view of an intermediate, square here, and what is detached from it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        square = self.body(x)[:WIDTH].t()
        part = square[1:]
        return square, square.detach(), part, part.detach(), part.detach().t()


class Checkpointed(nn.Module):
    """Uses torch's own recomputation already, with dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(0.2), mlp(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint.checkpoint(self.a, x, use_reentrant=False)
        return checkpoint.checkpoint(self.b, x, use_reentrant=False)


class Attention(nn.Module):
    """Self-attention with a mask, layer norms and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    model[6].bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "mlp": (lambda: mlp(0.3), lambda: Batch((rows(),))),
    "tied": (TiedWeights, lambda: Batch((torch.randint(50, (ROWS,)),))),
    "frozen": (frozen, lambda: Batch((rows(),))),
    "unused": (Unused, lambda: Batch((rows(),))),
    "two_in_two_out": (TwoInTwoOut, lambda: Batch((rows(),), {"b": rows(64)})),
    "dicts": (Dicts, lambda: Batch(({"x": rows(), "y": rows()},), {"scale": torch.tensor(3.0)})),
    "hugging_face_output": (HuggingFaceOutput, lambda: Batch((rows(),))),
    "dataclass_output": (DataclassOutput, lambda: Batch((rows(),))),
    "constants": (Constants, lambda: Batch((rows(), 2, True), {"mode": "sum", "mask": None})),
    "in_place": (InPlace, lambda: Batch((rows(),))),
    "batch_norms": (BatchNorms, lambda: Batch((torch.randn(8, 3, 16, 16),))),
    "moving_average": (MovingAverage, lambda: Batch((rows(),))),
    "writes_to_input": (WritesToInput, lambda: Batch((rows(),))),
    "aliases": (Aliases, lambda: Batch((rows(),))),
    "detached_views": (DetachedViews, lambda: Batch((rows(),))),
    "checkpointed": (Checkpointed, lambda: Batch((rows(),))),
    "attention": (Attention, lambda: Batch((torch.randn(4, 24, WIDTH),))),
    "input_needs_grad": (mlp, lambda: Batch((rows().requires_grad_(),))),
}


def in_bfloat16() -> nn.Module:
    return Attention().bfloat16()


def norm_of_the_input() -> nn.Module:
    """Group norm in bfloat16 and channels_last, whose kernel crashes where its input's gradient is not asked for."""
    norm = nn.GroupNorm(1, 8)
    return norm.bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def image_with_gradient() -> Tensor:
    return torch.randn(3, 8, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()


MODELS |= {
    "bfloat16": (in_bfloat16, lambda: Batch((torch.randn(4, 24, WIDTH).bfloat16(),))),
    "norm_of_the_input": (norm_of_the_input, lambda: Batch((image_with_gradient(),))),
    "frozen_but_input": (
        lambda: mlp().requires_grad_(False),
        lambda: Batch((rows().requires_grad_(),)),
    ),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), mlp()),
        lambda: Batch((rows(),)),
    ),
}


def make(name: str) -> tuple[nn.Module, Batch]:
    """A model in training mode and its batch; the same each time."""
    build, batch = MODELS[name]
    torch.manual_seed(0)
    return build().train(), batch()
