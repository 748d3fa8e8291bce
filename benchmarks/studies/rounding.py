"""Decides ADR 10: compares stochastic and nearest rounding in real training.

Everything that may be lossy is kept at the same width, so both take the same bytes; no error limit holds. The models
and data are those of ``benchmarks.convergence``. Stochastic rounding exists in this script only (docs/adr/0010).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.table import Table
from torch import Generator, Tensor, nn

from benchmarks.convergence import evaluated
from benchmarks.lib.common import add_slices, names_of, wide_console, with_missing
from benchmarks.lib.results import Record
from benchmarks.lib.training_tasks import digits, language, packages
from fxhybrid.accuracy.verifier import reference
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import TensorMeta, register
from fxhybrid.codecs.kernels.reference import pack_rows
from fxhybrid.codecs.rowwise import Rowwise
from fxhybrid.demo.demo_tasks import Task
from fxhybrid.ir.plan import SAVE, Action, Compress
from fxhybrid.ir.schedule import lower
from fxhybrid.options import Options
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.pipeline import Prepared, prepare
from fxhybrid.runtime import StepFunction

MINUTES = 30
NEEDS = "scikit-learn"

TASKS: dict[str, Callable[[int, int], Task]] = {"digits": digits, "packages": packages, "language": language}
WIDTHS = (4,)  # the narrowest that plans are offered
ROUNDINGS = ("nearest", "stochastic")
SEEDS = 3


class Stochastic(Rowwise):
    """Row-wise codes rounded up with the probability of the fraction: spec ``stochastic<bits>:R``.

    Noise of up to half a step comes before rounding to nearest; a row's lowest and highest value stay as they are.
    """

    generator = Generator().manual_seed(0)

    def __init__(self, bits: int, row: int) -> None:
        super().__init__(bits, row)
        self.spec = f"stochastic{bits}:{row}"

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        rows = x.detach().as_strided((meta.numel,), (1,))[: meta.numel // self.row * self.row].view(-1, self.row)
        low, high = rows.aminmax(dim=1, keepdim=True)
        step = pack_rows(torch.cat([low, high], 1).repeat(1, 4), self.bits, sqrt=False)[1][:, :1]
        noise = (torch.rand(rows.shape, generator=self.generator) - 0.5) * step
        noisy = torch.where((rows == low) | (rows == high), rows, (rows + noise).clamp(low, high))
        moved = x.detach().clone(memory_format=torch.preserve_format)
        moved.as_strided((meta.numel,), (1,))[: noisy.numel()] = noisy.view(-1)
        return super()._encode(moved, meta)


def _register(bits: int) -> None:
    register(f"stochastic{bits}", lambda row: Stochastic(bits, int(row)))


for _bits in WIDTHS:
    _register(_bits)


def graphs(prepared: Prepared, bits: int, rounding: str) -> SplitGraphs:
    """The step with everything that may be lossy at ``bits``."""
    problem = prepared.problem
    actions: dict[int, Action] = {t: SAVE for i in problem.deferrable for t in problem.forward[i].outputs}
    for storage, codecs in prepared.choices.items():
        found = next((codec for codec in codecs if codec.startswith(f"rowwise{bits}:")), None)
        if found is not None:
            actions[storage] = Compress(found)
    joint = rewrite(prepared.joint, prepared.layout, lower(problem, actions))
    if rounding == "stochastic":
        for node in joint.module.graph.nodes:
            renamed = tuple(a.replace("rowwise", "stochastic") if isinstance(a, str) else a for a in node.args)
            if node.target in (torch.ops.fxhybrid.compress.default, torch.ops.fxhybrid.decompress.default):
                node.args = renamed
    return split(joint)


def train(task: Task, bits: int, rounding: str) -> Record:
    """One run; ``bits`` 32: unmodified."""
    model, batches = task.make_model(), task.batches()
    step, example = Step(model, task.loss_fn, False), next(batches)
    call = StepCall((example[0],), {}, (example[1],))
    function: Callable[..., Tensor] = step
    record = {}
    if bits < 32:
        prepared = prepare(step, call, Options.checked(budget=1.0, loss_fn=task.loss_fn))
        made = graphs(prepared, bits, rounding)
        record["error"] = reference(prepared, step, call).gradient_error(made)
        bound = prepared.capture.bind(StepFunction(made, StepInterface.of(prepared.joint), prepared.capture.metadata))
        function = partial(bound, step)
    _run(task, model, function, itertools.chain([example], batches))
    return record | evaluated(model, task)


def _run(
    task: Task, model: nn.Module, function: Callable[..., Tensor], batches: itertools.chain[tuple[Tensor, Tensor]]
) -> None:
    optimizer = task.make_optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    for x, y in itertools.islice(batches, task.steps):
        optimizer.zero_grad()
        function((x,), {}, (y,)).backward()
        optimizer.step()
        schedule.step()


def runs_table(records: Sequence[Record]) -> Table:
    """One row per task, width and rounding: means over the seeds, with those of float32."""
    table = Table(title="Everything at one width: rounding to nearest and stochastic rounding")
    for name in (
        "task",
        "width",
        "rounding",
        "seeds",
        "gradient error at start",
        "held-out loss",
        "spread",
        "accuracy",
    ):
        table.add_column(name, justify="left" if name in ("task", "rounding") else "right")
    kinds = dict.fromkeys((r["model"], r["bits"], r["rounding"]) for r in records)
    for kind in kinds:
        own = [r for r in records if (r["model"], r["bits"], r["rounding"]) == kind]
        losses = [r["loss"] for r in own]
        error = statistics.fmean(r.get("error", 0.0) for r in own)
        spread = f"{statistics.stdev(losses):.4f}" if len(own) > 1 else ""
        accuracy = statistics.fmean(100 * r["right"] / r["of"] for r in own)
        figures = f"{error:.3f}", f"{statistics.fmean(losses):.4f}", spread, f"{accuracy:.2f}"
        table.add_row(kind[0], str(kind[1]), kind[2], str(len(own)), *figures)
    return table


def _record(name: str, seed: int, bits: int, rounding: str) -> Record:
    return {"part": "rounding", "bits": bits, "rounding": rounding} | train(TASKS[name](seed, 0), bits, rounding)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing and prints all."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.rounding", description=__doc__)
    parser.add_argument("--tasks", metavar="LIST", help=f"default: all of {','.join(TASKS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default: {SEEDS})")
    add_slices(parser)
    arguments = parser.parse_args(argv)
    kinds = [(32, "none"), *itertools.product(WIDTHS, ROUNDINGS)]
    names = names_of(arguments.tasks, TASKS, "task")
    runs = (
        (name, f"{seed}/{bits}/{rounding}", partial(_record, name, seed, bits, rounding))
        for name, seed, (bits, rounding) in itertools.product(names, range(arguments.seeds), kinds)
    )
    records = with_missing(arguments, runs, lambda r: f"{r['model']} {r['key']}")
    wide_console().print(runs_table(records))


if __name__ == "__main__":
    main()
