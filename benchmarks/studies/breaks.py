"""Decides ADR 21: what a step of four graphs costs against the same model in one.

Models of four stages, with a break behind each of the first three and without, and the suite's BERT likewise: the
smallest peak that can be planned, as measured, and the processor time of steps at the peak of the save-all step, in
pairs, for this batch and a larger one. The C library keeps what is freed: which steps pay for pages that it gave back
is chance.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break

import fxhybrid
from benchmarks.lib.common import Bench, Step, pair_ratios, seconds, table_of_rows, wide_console
from fxhybrid import HybridModule, measure_step
from fxhybrid.units import Budget

MINUTES = 8
NEEDS = "transformers"
N_STAGES = 4
CHANNELS, WIDTH, CLASSES = 24, 64, 10
LARGER = 8
N_TIMED = 7
Compiled = tuple[HybridModule, Step]
Maker = Callable[[bool, str, Budget], Compiled]
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


class Ended(nn.Module):
    """Ends a graph behind a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer returns."""
        result = self.layer(*args, **kwargs)
        graph_break()
        return result


def of_stages(kind: Kind) -> Maker:
    """Returns what compiles the models of a kind."""
    x = torch.randn(kind.shape, generator=torch.Generator().manual_seed(0))

    def compiled(broken: bool, compression: str, budget: Budget) -> Compiled:
        hybrid = fxhybrid.compile(
            Stages(kind, broken=broken), budget=budget, example_inputs=(x,), loss_fn=_loss, compression=compression
        )

        def step() -> None:
            hybrid(x).backward()
            hybrid.zero_grad()

        return hybrid, step

    return compiled


def bert(broken: bool, compression: str, budget: Budget) -> Compiled:
    """Compiles the suite's BERT, with a break behind each of its four layers but the last, or without."""
    bench = Bench("bert", "full")
    layers: Any = bench.case.model.get_submodule("bert.encoder.layer")
    for i in range(N_STAGES - 1) if broken else ():
        layers[i] = Ended(layers[i])
    hybrid = bench.compile(budget, compression=compression)
    return hybrid, bench.step_of(hybrid)


def _makers() -> Iterator[tuple[str, Maker, Maker | None]]:
    """Yields what compiles each model, and what compiles it for a larger batch, where its step is small."""
    for name, kind in KINDS.items():
        larger = replace(kind, shape=(LARGER * kind.shape[0], *kind.shape[1:]))
        yield name, of_stages(kind), of_stages(larger)
    yield "BERT", bert, None


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table, a row for each model and mode."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.breaks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=31, help="pairs of steps (default: 31)")
    arguments = parser.parse_args(argv)
    for parameter, n_bytes in KEEP.items():
        ctypes.CDLL(None).mallopt(parameter, n_bytes)
    columns = ("model", "compression", "smallest peak", "with breaks", "more", "step: with breaks", "of a larger batch")
    wide_console().print(table_of_rows("a step of four graphs", columns, _rows(arguments.pairs)))


def _rows(n_pairs: int) -> Iterator[tuple[str, ...]]:
    for name, usual, larger in _makers():
        for compression in ("lossless", "auto"):
            whole, split = (_smallest_bytes(usual, broken, compression) for broken in (False, True))
            peaks = f"{whole / 1e6:.2f} MB", f"{split / 1e6:.2f} MB", f"{split / whole - 1:+.1%}"
            times = (_times(maker, compression, n_pairs) if maker else "" for maker in (usual, larger))
            yield name, compression, *peaks, *times


def _times(compiled: Maker, compression: str, n_pairs: int) -> str:
    """Compares steps that save all: milliseconds without breaks, and the ratio."""
    (_, whole), (_, split) = (compiled(broken, compression, 1.0) for broken in (False, True))
    ratio = median(pair_ratios(whole, split, n_pairs, time.process_time))
    whole_s = median(seconds(whole, time.process_time) for _ in range(N_TIMED))
    return f"{1e3 * whole_s:.0f} ms: {ratio:.3f}"


def _smallest_bytes(compiled: Maker, broken: bool, compression: str) -> int:
    """Measures the smallest peak."""
    hybrid, step = compiled(broken, compression, "smallest")
    return measure_step(step, modules=hybrid, repeats=0).peak_bytes


def _loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % CLASSES)


if __name__ == "__main__":
    main()
