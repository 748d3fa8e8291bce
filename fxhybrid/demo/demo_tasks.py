"""What the demo trains on: real data that ships with the installed packages."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fxhybrid.optional_imports import require

Batch = tuple[Tensor, Tensor]

SEED = 0
HELD_OUT = 0.2  # share of the digits, and of the text's files
DIGITS_BATCH = 128
TEXT_BATCH, TEXT_LENGTH, TEXT_BYTES = 16, 128, 2_000_000
N_BYTES = 256


@dataclass(frozen=True)
class Task:
    """A model to train, and its data.

    Attributes:
        name: short name.
        about: one sentence.
        make_model: the same model at every call.
        make_optimizer: from the model's parameters.
        loss_fn: ``loss_fn(output, target)``; mean cross entropy.
        batches: endless training batches, the same at every call.
        held_out: batches that are never trained on.
        steps: training steps of one run.
    """

    name: str
    about: str
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[], Iterator[Batch]]
    held_out: tuple[Batch, ...]
    steps: int


def digits_task() -> Task:
    """A batch-norm CNN on scikit-learn's 8 x 8 handwritten digits."""
    data = require("sklearn.datasets", "the demo").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(SEED))
    n_held_out = int(len(labels) * HELD_OUT)
    held_out, trained = order[:n_held_out], order[n_held_out:]

    def batches() -> Iterator[Batch]:
        generator = Generator().manual_seed(SEED)
        while True:
            shuffled = trained[torch.randperm(len(trained), generator=generator)]
            for start in range(0, len(trained) - DIGITS_BATCH + 1, DIGITS_BATCH):
                chosen = shuffled[start : start + DIGITS_BATCH]
                yield images[chosen], labels[chosen]

    return Task(
        "digits",
        f"batch-norm CNN, {len(trained)} training images of scikit-learn's digits, {n_held_out} held out",
        lambda: _seeded(DigitsNet),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9),
        F.cross_entropy,
        batches,
        ((images[held_out], labels[held_out]),),
        steps=88,
    )


def text_task() -> Task:
    """A small transformer that predicts the next byte of the Python standard library's source."""
    trained, held_out = _library_text()

    def batches() -> Iterator[Batch]:
        generator = Generator().manual_seed(SEED)
        while True:
            yield _windows(trained, generator)

    generator = Generator().manual_seed(SEED)
    return Task(
        "text",
        f"transformer, next byte of {len(trained) / 1e6:.1f} MB of the standard library's source, "
        f"{len(held_out) / 1e6:.1f} MB of other files held out",
        lambda: _seeded(ByteTransformer),
        lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3),
        next_byte_loss,
        batches,
        tuple(_windows(held_out, generator) for _ in range(8)),
        steps=120,
    )


def next_byte_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy over all positions; logits (batch, length, 256), target (batch, length)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make()


def _library_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes of other files to evaluate on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(SEED).shuffle(files)
    cut = int(len(files) * HELD_OUT)
    return _joined(files[cut:]), _joined(files[:cut])


def _joined(files: list[Path]) -> Tensor:
    text = b"".join(path.read_bytes() for path in files)[:TEXT_BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _windows(text: Tensor, generator: Generator) -> Batch:
    starts = torch.randint(len(text) - TEXT_LENGTH - 1, (TEXT_BATCH,), generator=generator)
    windows = text[starts[:, None] + torch.arange(TEXT_LENGTH + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class DigitsNet(nn.Module):
    """Two stages of 3 x 3 convolutions with batch norm and ReLU, then a linear classifier."""

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


class ByteTransformer(nn.Module):
    """Three pre-norm causal transformer blocks over bytes."""

    def __init__(self, width: int = 96, n_heads: int = 4, n_layers: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(N_BYTES, width)
        self.places = nn.Parameter(torch.randn(TEXT_LENGTH, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Causal attention and a GELU layer, each beside a residual connection."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
