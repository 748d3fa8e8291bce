"""Compares memory, error and step time with common memory-saving recipes.

Each recipe runs on the suite's models at its own settings; fxhybrid then gets the recipe's measured peak as
its budget, and its gradient error as the limit if that is below the default, so that the two are compared at the same
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import Bench, Step, median_ratio, names_of, wide_console
from benchmarks.lib.results import Record, append_record
from fxhybrid import BudgetError, suite
from fxhybrid.accuracy.step_result import relative_difference
from fxhybrid.torch_internals import functorch_config

MINUTES = 60
NEEDS = "transformers"

RATIOS = (0.75, 0.5, 0.25)
SMALLEST = 4096  # elements below which int8 is not worth it
INT8 = "int8 saved-tensor hooks"
MAX_GRAD_ERROR = 0.1  # unless the recipe's own error is smaller
LOSSY = 1e-5  # below, a recipe only adds in another order


@dataclass(frozen=True)
class Recipe:
    """A way to save memory; ``loss`` gives the loss of a case under it."""

    name: str
    setting: str
    loss: Callable[[], Tensor]


def int8_hooks(bench: Bench) -> Recipe:
    """Every large saved float tensor as int8 with one scale, ten lines."""
    parameters = {p.untyped_storage().data_ptr() for p in bench.case.model.parameters()}

    def pack(x: Tensor) -> Any:
        own = x.untyped_storage().data_ptr() in parameters
        if own or x.dtype != torch.float32 or x.numel() < SMALLEST:
            return x
        scale = x.abs().amax().clamp_min(1e-12) / 127
        return (x / scale).round_().to(torch.int8), scale

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].float().mul_(packed[1])

    def loss() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return bench.case.loss()

    return Recipe(INT8, "", loss)


def activation_budget(bench: Bench, ratio: float) -> Recipe:
    """PyTorch's partitioner with its own memory budget, a ratio of its estimate."""
    torch.compiler.reset()
    compiled = torch.compile(bench.case.loss, backend="aot_eager", fullgraph=True, dynamic=False)

    def loss() -> Tensor:
        with functorch_config.patch(activation_memory_budget=ratio):
            return compiled()

    return Recipe("activation_memory_budget", f"{ratio}", loss)


MAKERS: dict[str, Callable[[Bench], Recipe]] = {
    "int8": int8_hooks,
    **{f"budget-{ratio}": partial(activation_budget, ratio=ratio) for ratio in RATIOS},
}


def compare(bench: Bench, recipes: Sequence[str], pairs: int) -> Iterator[Record]:
    """One record per recipe and setting."""
    expected = gradients(bench, bench.eager_step)
    for name in recipes:
        recipe = MAKERS[name](bench)
        loss = recipe.loss

        def step(loss: Callable[[], Tensor] = loss) -> None:
            bench.step_with(loss)

        record: Record = {
            "model": bench.name,
            "part": "peers",
            "key": f"{recipe.name} {recipe.setting}".strip(),
        }
        try:
            error = relative_difference(gradients(bench, step), expected)
            peak_bytes = bench.measure(step).peak_bytes
            record |= {
                "eager_peak_bytes": bench.eager.peak_bytes,
                "peak_bytes": peak_bytes,
                "gradient_error": error,
                "ratio": median_ratio(bench.eager_step, step, pairs),
            }
            record |= _ours(bench, peak_bytes, min(error, MAX_GRAD_ERROR) if error > LOSSY else MAX_GRAD_ERROR, pairs)
        except Exception as error:  # noqa: BLE001  a recipe that does not work on a model is a result too
            record["error"] = f"{type(error).__name__}: {error}"
        yield record


def _ours(bench: Bench, budget_bytes: int, max_grad_error: float, pairs: int) -> Record:
    try:
        hybrid = bench.compile(budget_bytes, max_grad_error=max_grad_error)
    except BudgetError as error:
        return {"ours_minimum_bytes": error.minimum_bytes}
    step = bench.step_of(hybrid)
    return {
        "ours_peak_bytes": bench.measure(step).peak_bytes,
        "ours_gradient_error": bench.gradient_error(hybrid),
        "ours_ratio": median_ratio(bench.eager_step, step, pairs),
    }


def gradients(bench: Bench, step: Step) -> dict[str, Tensor | None]:
    """All parameter gradients of one step at a fixed seed; buffers are put back."""
    buffers = [(b, b.clone()) for b in bench.case.model.buffers()]
    torch.manual_seed(0)
    step()
    found = {name: p.grad for name, p in bench.case.model.named_parameters()}
    bench.zero_grad()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return found


def peers_table(records: Sequence[Record]) -> Table:
    """One row per recipe, with ours at the same peak."""
    table = Table(title="Peers, and fxhybrid with their measured peak as its budget")
    for name in ("model", "recipe"):
        table.add_column(name)
    for name in ("peak share", "grad error", "step ratio", "ours: share", "grad error", "step ratio"):
        table.add_column(name, justify="right")
    for r in records:
        if "error" in r:
            table.add_row(r["model"], r["key"], r["error"].splitlines()[0][:60])
            continue
        eager = r["eager_peak_bytes"]
        ours = ("out of reach", "", "")
        if "ours_ratio" in r:
            share = f"{r['ours_peak_bytes'] / eager:.2f}"
            ours = (share, f"{r['ours_gradient_error']:.3f}", f"{r['ours_ratio']:.2f}")
        own = (f"{r['peak_bytes'] / eager:.2f}", f"{r['gradient_error']:.3f}", f"{r['ratio']:.2f}")
        table.add_row(r["model"], r["key"], *own, *ours)
    return table


def judge(records: Sequence[Record]) -> list[Check]:
    """Against the int8 recipe: a smaller gradient error at no larger peak and in no more time."""
    own = [r for r in records if r["key"] == INT8 and "ours_ratio" in r]
    checks = []
    for what, asked, ours, theirs in (
        ("gradient error", "below the recipe's", "ours_gradient_error", "gradient_error"),
        ("peak", "at most the recipe's", "ours_peak_bytes", "peak_bytes"),
        ("step time", "at most the recipe's", "ours_ratio", "ratio"),
    ):
        shares = {r["model"]: r[ours] / r[theirs] for r in own}
        found = ", ".join(f"{name} {share:.2f} x" for name, share in shares.items())
        checks.append(Check(f"int8 hooks: {what}", asked, found, max(shares.values()) <= 1 if shares else None))
    return checks


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    known = suite.names()
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(known)}")
    parser.add_argument("--recipes", metavar="LIST", help=f"default: all of {','.join(MAKERS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--pairs", type=int, default=11, help="interleaved pairs per timing (default: 11)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    arguments = parser.parse_args(argv)
    console, records = wide_console(), []
    recipes = names_of(arguments.recipes, MAKERS, "recipe")
    for name in names_of(arguments.models, known, "model"):
        for record in compare(Bench(name, arguments.size), recipes, arguments.pairs):
            records.append(record)
            append_record(arguments.json, record)
            console.print(f"{record['model']}: {record['key']}", highlight=False)
    console.print(peers_table(records))
    console.print(checks_table(judge(records)))


if __name__ == "__main__":
    main()
