"""Sample data for suite, demo, federated tasks and benchmarks: synthetic batches, digits, and Python source."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fxhybrid.errors import InvalidArgument
from fxhybrid.optional_imports import require

Batch = tuple[Tensor, Tensor]

HELD_OUT_SHARE = 0.2  # of the digits' images, of a text
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# packages and modules that are no plain source, or differ between installations
_NO_PACKAGES = ("_", "site-packages", "test", "config-", "idlelib", "lib2to3")

# -- synthetic batches ------------------------------------------------------------------------------------


def smooth_images(batch: int, pixels: int, data: Generator, channels: int = 3) -> Tensor:
    """Draws images whose neighbouring pixels are alike, as in photographs.

    Returns:
        float32 ``(batch, channels, pixels, pixels)``, mean 0 and deviation 1 per channel.
    """
    coarse = torch.randn(batch, channels, max(2, pixels // 8), max(2, pixels // 8), generator=data)
    images = F.interpolate(coarse, size=(pixels, pixels), mode="bilinear")
    images += 0.2 * torch.randn(images.shape, generator=data)
    deviation, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return (images - mean) / deviation


def word_ids(batch: int, length: int, vocabulary: int, data: Generator) -> Tensor:
    """Draws token ids ``(batch, length)`` that follow Zipf's law, as words do; ids 0 to 9 are for special tokens."""
    share = 1 / torch.arange(3, vocabulary - 10 + 3, dtype=torch.float64)
    ids = torch.multinomial(share, batch * length, replacement=True, generator=data)
    return ids.view(batch, length) + 10


def labels(batch: int, n_classes: int, data: Generator) -> Tensor:
    """Draws class ids ``(batch,)`` evenly."""
    return torch.randint(n_classes, (batch,), generator=data)


# -- batches of given examples ----------------------------------------------------------------------------


def split_held_out(n_examples: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Shuffles the indices of examples and splits them into those to train on and the held-out fifth."""
    order = torch.randperm(n_examples, generator=Generator().manual_seed(seed))
    n_held_out = int(n_examples * HELD_OUT_SHARE)
    return order[n_held_out:], order[:n_held_out]


def epoch_batches(inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yields endless batches, reshuffled in each epoch; drops what does not fill a batch at an epoch's end."""
    generator = Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(targets), generator=generator)
        for start in range(0, len(targets) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield inputs[chosen], targets[chosen]


# -- digits -----------------------------------------------------------------------------------------------


def load_digits(purpose: str) -> Batch:
    """Loads scikit-learn's handwritten digits.

    Args:
        purpose: what needs them, for the error.

    Returns:
        float32 images ``(1797, 1, 8, 8)`` in [-1, 1], and their int64 classes.

    Raises:
        InvalidArgument: scikit-learn is not installed.
    """
    return _digits(require("sklearn.datasets", purpose))


@lru_cache(maxsize=1)
def _digits(datasets: ModuleType) -> Batch:
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)


# -- the source text of Python's standard library ---------------------------------------------------------


def library_modules() -> list[Path]:
    """Lists the standard library's single-file modules, by name."""
    return sorted(LIBRARY.glob("*.py"))


def library_packages(n_packages: int, most_bytes: int) -> Mapping[str, bytes]:
    """Reads the source of the standard library's largest packages, by name.

    Single modules count as packages of their own, so that there are enough of them.
    """
    texts: dict[str, bytes] = {}
    for path in sorted(LIBRARY.iterdir()):
        if path.name.startswith(_NO_PACKAGES):
            continue
        if path.is_dir() and (path / "__init__.py").exists():
            files = (f for f in path.rglob("*.py") if "tests" not in f.parts and "test" not in f.parts)
            texts[path.name] = joined_source(sorted(files))
        elif path.suffix == ".py":
            texts[path.stem] = path.read_bytes()
    largest = sorted(texts, key=lambda name: (-len(texts[name]), name))[:n_packages]
    return {name: texts[name][:most_bytes] for name in sorted(largest)}


def joined_source(paths: Iterable[Path]) -> bytes:
    """Reads files one after another."""
    return b"".join(path.read_bytes() for path in paths)


def as_bytes(text: bytes) -> Tensor:
    """Copies a text into a uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def random_windows(text: Tensor, count: int, length: int, generator: Generator) -> Tensor:
    """Draws pieces of a text. Returns int64 ``(count, length)``."""
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)].long()


def next_byte_batch(windows: Tensor) -> Batch:
    """Splits windows into the bytes that a model reads and the bytes that follow each of them."""
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def consecutive_windows(text: bytes, length: int) -> Batch:
    """Cuts a text into consecutive pieces, and the bytes that follow each of theirs. Both int64 ``(n, length)``.

    Raises:
        InvalidArgument: the text is shorter than one piece.
    """
    ids = as_bytes(text).long()
    count = (len(ids) - 1) // length
    if count < 1:
        raise InvalidArgument(f"{len(ids)} bytes do not make a piece of {length}; give at least {length + 1}")
    used = count * length
    return ids[:used].view(count, length), ids[1 : used + 1].view(count, length)
