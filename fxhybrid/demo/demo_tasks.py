"""What the demo trains on: real data that ships with the installed packages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fxhybrid.suite.sample_data import (
    HELD_OUT_SHARE,
    Batch,
    as_bytes,
    epoch_batches,
    joined_source,
    library_modules,
    load_digits,
    next_byte_batch,
    random_windows,
    split_held_out,
)
from fxhybrid.suite.small_models import DigitsNet, language_model, next_byte_loss, seeded

SEED = 0
DIGITS_BATCH = 128
TEXT_BATCH, TEXT_LENGTH, TEXT_BYTES = 16, 128, 2_000_000


@dataclass(frozen=True)
class Task:
    """Holds a model to train, and its data.

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
    """Makes the task of a batch-norm CNN on scikit-learn's 8 x 8 handwritten digits.

    Raises:
        InvalidArgument: scikit-learn is not installed.
    """
    images, labels = load_digits("the demo")
    trained, held_out = split_held_out(len(labels), seed=SEED)
    return Task(
        "digits",
        f"batch-norm CNN, {len(trained)} training images of scikit-learn's digits, {len(held_out)} held out",
        lambda: seeded(DigitsNet, SEED),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9),
        F.cross_entropy,
        lambda: epoch_batches(images[trained], labels[trained], DIGITS_BATCH, SEED),
        ((images[held_out], labels[held_out]),),
        steps=88,
    )


def text_task() -> Task:
    """Makes the task of a small transformer that predicts the next byte of the standard library's source."""
    files = library_modules()
    random.Random(SEED).shuffle(files)
    cut = int(len(files) * HELD_OUT_SHARE)
    held_out, trained = (as_bytes(joined_source(part)[:TEXT_BYTES]) for part in (files[:cut], files[cut:]))

    def batches() -> Iterator[Batch]:
        generator = Generator().manual_seed(SEED)
        while True:
            yield _batch(trained, generator)

    generator = Generator().manual_seed(SEED)
    return Task(
        "text",
        f"transformer, next byte of {len(trained) / 1e6:.1f} MB of the standard library's source, "
        f"{len(held_out) / 1e6:.1f} MB of other files held out",
        lambda: seeded(language_model, SEED),
        lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3),
        next_byte_loss,
        batches,
        tuple(_batch(held_out, generator) for _ in range(8)),
        steps=120,
    )


def _batch(text: Tensor, generator: Generator) -> Batch:
    return next_byte_batch(random_windows(text, TEXT_BATCH, TEXT_LENGTH + 1, generator))
