"""Real training for ``benchmarks.convergence``: data that ships with the installed packages, small models, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fxhybrid.demo.demo_tasks import Task, text_task
from fxhybrid.suite.sample_data import LIBRARY, Batch, as_bytes, epoch_batches, joined_source, load_digits
from fxhybrid.suite.small_models import ByteTransformer, DigitsNet, language_model, seeded

FOLDS = 5
PACKAGES = (
    *("asyncio", "ctypes", "distutils", "email", "encodings", "idlelib"),
    *("importlib", "lib2to3", "multiprocessing", "tkinter", "unittest", "xml"),
)
BLOCK_BYTES, WINDOW = 2048, 128
HELD_OUT_BLOCKS = 5  # every fifth block is held out


def digits(seed: int, fold: int) -> Task:
    """Makes the task of the demo's batch-norm CNN on four fifths of the 1,797 digits; the fold is held out."""
    images, labels = load_digits("the benchmark")
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    is_held_out = torch.arange(len(labels)) % FOLDS == fold
    held_out, trained = order[is_held_out], order[~is_held_out]
    return Task(
        "digits",
        "the demo's batch-norm CNN, cross-validated",
        lambda: seeded(DigitsNet, seed),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4),
        F.cross_entropy,
        lambda: epoch_batches(images[trained], labels[trained], 128, seed),
        ((images[held_out], labels[held_out]),),
        steps=330,
    )


def packages(seed: int, _fold: int) -> Task:
    """Makes the task of telling from 128 bytes which package of the standard library they come from."""
    trained, held_out = _package_windows()
    return Task(
        "packages",
        "two transformer blocks and a linear classifier of their mean",
        lambda: seeded(_classifier, seed),
        lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05),
        F.cross_entropy,
        lambda: epoch_batches(*trained, 32, seed),
        tuple(zip(held_out[0].split(512), held_out[1].split(512), strict=True)),
        steps=900,
    )


def language(seed: int, _fold: int) -> Task:
    """Makes the task of the demo's language model; seeds begin at different batches."""
    task, steps = text_task(), 600

    def batches() -> Iterator[Batch]:
        found = task.batches()
        for _ in range(seed * steps):
            next(found)
        return found

    return replace(task, make_model=lambda: seeded(language_model, seed), batches=batches, steps=steps)


def _classifier() -> ByteTransformer:
    return ByteTransformer(width=64, n_heads=4, n_layers=2, length=WINDOW, n_classes=len(PACKAGES))


def _package_windows() -> tuple[Batch, Batch]:
    """Cuts each package's source into windows, labelled by package: to train on, and from other blocks."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, package in enumerate(PACKAGES):
        text = joined_source(sorted((LIBRARY / package).rglob("*.py")))
        whole = len(text) // BLOCK_BYTES * BLOCK_BYTES
        blocks = as_bytes(text[:whole]).view(-1, BLOCK_BYTES // WINDOW, WINDOW)
        for i, block in enumerate(blocks):
            side = int(i % HELD_OUT_BLOCKS == 0)
            parts[side].append(block)
            labels[side].extend([label] * len(block))
    trained, held_out = ((torch.cat(p).long(), torch.tensor(y)) for p, y in zip(parts, labels, strict=True))
    return trained, held_out
