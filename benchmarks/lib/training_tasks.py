"""Real training for ``benchmarks.convergence``: data that ships with the installed packages, small models, seeds."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fxhybrid.demo.demo_tasks import Batch, Block, ByteTransformer, DigitsNet, next_byte_loss, text_task
from fxhybrid.optional_imports import require

FOLDS = 5
PACKAGES = (
    *("asyncio", "ctypes", "distutils", "email", "encodings", "idlelib"),
    *("importlib", "lib2to3", "multiprocessing", "tkinter", "unittest", "xml"),
)
BLOCK_BYTES, WINDOW = 2048, 128
HELD_OUT_BLOCKS = 5  # every fifth block is held out
N_BYTES = 256


@dataclass(frozen=True)
class Task:
    """One training run to make; the same at every call for the same seed and fold.

    Attributes:
        make_model: with the seed's weights.
        make_optimizer: from the model; its learning rate falls to zero over ``steps``.
        loss_fn: ``loss_fn(output, target)``.
        batches: endless training batches.
        held_out: batches that are never trained on.
        steps: training steps.
    """

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[], Iterator[Batch]]
    held_out: Sequence[Batch]
    steps: int


def digits(seed: int, fold: int) -> Task:
    """The demo's batch-norm CNN on four fifths of scikit-learn's 1,797 digits; the fold is held out."""
    data = require("sklearn.datasets", "the benchmark").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    is_held_out = torch.arange(len(labels)) % FOLDS == fold
    held_out, trained = order[is_held_out], order[~is_held_out]
    return Task(
        lambda: _seeded(DigitsNet, seed),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4),
        F.cross_entropy,
        lambda: _epochs(images[trained], labels[trained], 128, seed),
        [(images[held_out], labels[held_out])],
        steps=330,
    )


def packages(seed: int, _fold: int) -> Task:
    """A small transformer that tells from 128 bytes which package of the standard library they come from."""
    trained, held_out = _package_windows()
    return Task(
        lambda: _seeded(WindowClassifier, seed),
        lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05),
        F.cross_entropy,
        lambda: _epochs(*trained, 32, seed),
        [(x, y) for x, y in zip(held_out[0].split(512), held_out[1].split(512), strict=True)],
        steps=900,
    )


def language(seed: int, _fold: int) -> Task:
    """The demo's language model over the standard library's source; seeds begin at different batches."""
    task, steps = text_task(), 600

    def batches() -> Iterator[Batch]:
        found = task.batches()
        for _ in range(seed * steps):
            next(found)
        return found

    return Task(
        lambda: _seeded(ByteTransformer, seed), task.make_optimizer, next_byte_loss, batches, task.held_out, steps
    )


class WindowClassifier(nn.Module):
    """Two transformer blocks over the bytes of a window, then a linear classifier of their mean."""

    def __init__(self, width: int = 64, n_heads: int = 4, n_layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(N_BYTES, width)
        self.places = nn.Parameter(torch.randn(WINDOW, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places)).mean(1))


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _epochs(inputs: Tensor, targets: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    """Endless batches, shuffled anew in each epoch; what is left over at its end is dropped."""
    generator = Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(targets), generator=generator)
        for chosen in order.split(batch)[: len(targets) // batch]:
            yield inputs[chosen], targets[chosen]


def _package_windows() -> tuple[Batch, Batch]:
    """Windows of each package's source and which package that is: to train on, and from other blocks."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, package in enumerate(PACKAGES):
        text = b"".join(path.read_bytes() for path in sorted((library / package).rglob("*.py")))
        whole = len(text) // BLOCK_BYTES * BLOCK_BYTES
        blocks = torch.frombuffer(bytearray(text[:whole]), dtype=torch.uint8).view(-1, BLOCK_BYTES // WINDOW, WINDOW)
        for i, block in enumerate(blocks):
            side = int(i % HELD_OUT_BLOCKS == 0)
            parts[side].append(block)
            labels[side].extend([label] * len(block))
    trained, held_out = ((torch.cat(p).long(), torch.tensor(y)) for p, y in zip(parts, labels, strict=True))
    return trained, held_out
