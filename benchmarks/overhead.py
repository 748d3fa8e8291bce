"""Measures what a planned step takes beyond eager's where nothing is planned: small steps, where calls count.

Each model has a lossless plan that stores what eager stores. Steps of some 2 ms of tiny operators bound what guards,
autograd's function and Python between operators take; a step of operators of some 5 ms does so for common sizes. Steps
of both run in turn on one thread, and the median of the pairs' ratios of processor time is judged.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import fxhybrid
from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import add_record_files, pair_ratios, records_of, seconds, wide_console
from benchmarks.lib.results import Record

MINUTES = 1
NEEDS = ""

SMALL, LARGE = 1.10, 1.01  # time over eager's at most
Loss = Callable[..., Tensor]
Made = tuple[nn.Module, Tensor, Tensor]


def layers() -> Made:
    """Builds eight linear layers."""
    body = (layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.GELU()))
    return nn.Sequential(*body, nn.Linear(128, 10)), torch.randn(160, 128), torch.arange(160) % 10


def convolutions() -> Made:
    """Builds four convolutions with batch norms."""
    widths = (3, 16, 16, 32, 32)
    body = (
        m for a, b in itertools.pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
    )
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return model, torch.randn(4, 3, 16, 16), torch.arange(4) % 10


def attention() -> Made:
    """Builds one transformer layer with a head."""
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(block, nn.Linear(64, 10)), torch.randn(16, 20, 64), torch.arange(320).view(16, 20) % 10


def large_layers() -> Made:
    """Builds linear layers of some 5 ms each."""
    body = (layer for _ in range(4) for layer in (nn.Linear(768, 768), nn.ReLU()))
    return nn.Sequential(*body, nn.Linear(768, 10)), torch.randn(320, 768), torch.arange(320) % 10


CASES: dict[str, tuple[Callable[[], Made], float]] = {
    "8 linear layers": (layers, SMALL),
    "4 convolutions": (convolutions, SMALL),
    "1 transformer layer": (attention, SMALL),
    "4 large linear layers": (large_layers, LARGE),
}


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Computes the mean cross entropy."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cases and prints their table."""
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=301, help="steps of each in turn (default: 301)")
    add_record_files(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    def run() -> Iterator[Record]:
        return (measured(name, has_loss, arguments.pairs) for name in CASES for has_loss in (True, False))

    records = records_of(arguments, run, lambda record: f"{record['model']}: {record['ratio']:.3f}")
    console = wide_console()
    console.print(table_of(records))
    console.print(checks_table(judge(records)))


def measured(name: str, has_loss: bool, pairs: int) -> Record:
    """Compares a case's step, with the loss in the plan or behind it."""
    torch.manual_seed(0)
    make, _ = CASES[name]
    model, x, target = make()
    options = {"loss_fn": loss_of, "loss_args": (target,)} if has_loss else {}
    hybrid = fxhybrid.compile(
        copy.deepcopy(model),
        budget=1 << 40,
        example_inputs=(x,),
        compression="lossless",
        **options,  # type: ignore[arg-type]
    )

    def planned() -> Tensor:
        return hybrid(x, loss_args=(target,)) if has_loss else loss_of(hybrid(x), target)

    def step_of(own: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            for parameter in own.parameters():
                parameter.grad = None
            loss().backward()

        return step

    eager, ours = step_of(model, lambda: loss_of(model(x), target)), step_of(hybrid, planned)
    for _ in range(20):
        eager()
        ours()
    ratio = statistics.median(pair_ratios(eager, ours, pairs, time.process_time))
    eager_s = min(seconds(eager, time.process_time) for _ in range(20))
    kind = "in the plan" if has_loss else "behind it"
    return {"model": name, "part": "overhead", "key": kind, "eager_s": eager_s, "ratio": ratio}


def table_of(records: Sequence[Record]) -> Table:
    """Builds a table with a row for each record."""
    table = Table(title="Processor time over eager's, where all is stored")
    for column in ("model", "loss"):
        table.add_column(column)
    for column in ("eager, ms", "CPU time / eager"):
        table.add_column(column, justify="right")
    for r in records:
        table.add_row(r["model"], r["key"], f"{1e3 * r['eager_s']:.2f}", f"{r['ratio']:.3f}")
    return table


def judge(records: Sequence[Record]) -> list[Check]:
    """Judges the records."""
    found: dict[float, dict[str, float]] = {SMALL: {}, LARGE: {}}
    for r in records:
        found[CASES[r["model"]][1]][f"{r['model']}, loss {r['key']}"] = r["ratio"]
    return [
        check_of("small steps: time over eager's", f"at most {SMALL}", found[SMALL], SMALL, "{:.3f}"),
        check_of("operators of 5 ms: time over eager's", f"at most {LARGE}", found[LARGE], LARGE, "{:.3f}"),
    ]


if __name__ == "__main__":
    main()
