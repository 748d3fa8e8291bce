"""Decides ADR 21: what a step of four graphs costs against the same model in one.

Models of four stages, with a break behind each of the first three and without: the smallest peak that can be planned,
as measured, and the processor time of steps at the peak of the save-all step, in pairs, for this batch and a larger
one. The C library keeps what is freed: which steps pay for pages that it gave back is chance.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break

import fxhybrid
from benchmarks.lib.common import Step, pair_ratios, table_of_rows, wide_console
from fxhybrid import HybridModule, measure_step
from fxhybrid.units import Budget

MINUTES = 6
NEEDS = ""
N_STAGES = 4
CHANNELS, WIDTH, CLASSES = 24, 64, 10
LARGER = 8
KEEP = {-1: 1 << 30, -3: 1 << 30}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's malloc.h


def convolutions() -> nn.Module:
    """Two convolutions with batch norm."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers)


def linear() -> nn.Module:
    """Two linear layers without residual connections."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())


class Residual(nn.Module):
    """A transformer's feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Adds the body's result."""
        return x + self.body(x)


@dataclass(frozen=True)
class Kind:
    """Describes a model: one stage, the batch's shape, the width of what the last stage gives."""

    stage: Callable[[], nn.Module]
    shape: tuple[int, ...]
    width: int


KINDS = {
    "convolutions and batch norm": Kind(convolutions, (8, CHANNELS, 32, 32), CHANNELS),
    "linear layers": Kind(linear, (2048, WIDTH), WIDTH),
    "residual blocks": Kind(Residual, (2048, WIDTH), WIDTH),
}


class Stages(nn.Module):
    """The stages of a kind, with breaks between them or without, and a classifier."""

    def __init__(self, kind: Kind, *, broken: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(kind.stage() for _ in range(N_STAGES))
        self.head = nn.Linear(kind.width, CLASSES)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        """Classifies what the last stage gives."""
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.broken and i < N_STAGES - 1:
                graph_break()
        return self.head(x.flatten(2).mean(2) if x.dim() == 4 else x)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table, a row for each model and mode."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.breaks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=31, help="pairs of steps (default: 31)")
    arguments = parser.parse_args(argv)
    for parameter, n_bytes in KEEP.items():
        ctypes.CDLL(None).mallopt(parameter, n_bytes)
    columns = ("model", "compression", "smallest peak", "with breaks", "more", "time with breaks", "of a larger batch")
    wide_console().print(table_of_rows("a step of four graphs", columns, _rows(arguments.pairs)))


def _rows(n_pairs: int) -> Iterator[tuple[str, ...]]:
    for name, kind in KINDS.items():
        for compression in ("lossless", "auto"):
            whole, split = (_smallest(kind, broken, compression) for broken in (False, True))
            larger = replace(kind, shape=(LARGER * kind.shape[0], *kind.shape[1:]))
            ratios = (f"{_time_ratio(each, compression, n_pairs):.3f}" for each in (kind, larger))
            more = f"{split / whole - 1:+.1%}"
            yield name, compression, f"{whole / 1e6:.2f} MB", f"{split / 1e6:.2f} MB", more, *ratios


def _time_ratio(kind: Kind, compression: str, n_pairs: int) -> float:
    """Compares steps that save all, with breaks and without."""
    steps = [_step_of(_compiled(kind, broken, compression, 1.0), kind) for broken in (False, True)]
    return median(pair_ratios(steps[0], steps[1], n_pairs, time.process_time))


def _compiled(kind: Kind, broken: bool, compression: str, budget: Budget) -> HybridModule:
    x = torch.randn(kind.shape, generator=torch.Generator().manual_seed(0))
    model = Stages(kind, broken=broken)
    return fxhybrid.compile(model, budget=budget, example_inputs=(x,), loss_fn=_loss, compression=compression)


def _loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % CLASSES)


def _step_of(hybrid: HybridModule, kind: Kind) -> Step:
    x = torch.randn(kind.shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        hybrid(x).backward()
        hybrid.zero_grad()

    return step


def _smallest(kind: Kind, broken: bool, compression: str) -> int:
    """Measures the smallest peak."""
    hybrid = _compiled(kind, broken, compression, "smallest")
    return measure_step(_step_of(hybrid, kind), modules=hybrid, repeats=0).peak_bytes


if __name__ == "__main__":
    main()
