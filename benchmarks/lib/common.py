"""What the benchmark scripts share: steps of suite cases, timing and record files."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxhybrid
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid import suite
from fxhybrid.accuracy.step_result import StepResult, observe_step
from fxhybrid.cli.model_spec import ModelSpec, suite_spec
from fxhybrid.profiling.allocator import StepMeasurement, measure_step

Step = Callable[[], Any]
MARGIN = 1.02  # over the smallest known peak: compiling there must work
LEARNING_RATE = 1e-4  # real updates between measured steps, small enough to leave the comparison alone


@dataclass
class Bench:
    """One suite model with everything that the parts run on it."""

    name: str
    size: suite.Size

    @cached_property
    def case(self) -> suite.SuiteCase:
        """Model, inputs and loss."""
        return suite.load(self.name, self.size)

    @cached_property
    def target(self) -> ModelSpec:
        """The case in the form that ``fxhybrid.compile`` takes."""
        return suite_spec(self.case)

    @cached_property
    def eager(self) -> StepMeasurement:
        """Peak and seconds of the unmodified step."""
        return self.measure(self.eager_step, repeats=5)

    def zero_grad(self) -> None:
        """Lets go of all gradients."""
        for parameter in self.case.model.parameters():
            parameter.grad = None

    def eager_step(self) -> None:
        """One unmodified step, with fresh gradients."""
        self.step_with(self.case.loss)

    def step_with(self, loss: Callable[[], Tensor]) -> None:
        """One step of any form of the model, with fresh gradients."""
        self.zero_grad()
        loss().backward()

    def loss_of(self, model: nn.Module) -> Tensor:
        """The loss by a compiled model."""
        inputs, loss_args = self.target.inputs, self.target.loss_args
        if isinstance(inputs, dict):
            return model(**inputs, loss_args=loss_args)
        return model(*inputs, loss_args=loss_args)

    def step_of(self, model: nn.Module) -> Step:
        """One step of a compiled model, with fresh gradients."""
        return lambda: self.step_with(lambda: self.loss_of(model))

    def compile(self, budget: fxhybrid.units.Budget, **options: Any) -> fxhybrid.HybridModule:
        """The case's model at a budget."""
        target = self.target
        return fxhybrid.compile(
            target.model,
            budget=budget,
            example_inputs=target.inputs,
            loss_fn=target.loss_fn,
            loss_args=target.loss_args,
            **options,
        )

    def gradient_error(self, model: fxhybrid.HybridModule) -> float:
        """Measured relative gradient error on the case's batch."""
        inputs, loss_args = self.target.inputs, self.target.loss_args
        if isinstance(inputs, dict):
            return model.check_error(**inputs, loss_args=loss_args)
        return model.check_error(*inputs, loss_args=loss_args)

    def observe(self, loss: Callable[[], Tensor]) -> StepResult:
        """What one step of any form of the model leaves behind, at a fixed seed; the model stays as it was."""
        self.zero_grad()
        return observe_step(loss, self.case.model, has_loss=True)

    def measure(self, step: Step, *, repeats: int = 0) -> StepMeasurement:
        """Peak (and seconds, if ``repeats``) of a step."""
        return measure_step(step, modules=self.case.model, tensors=self.case.tensors, repeats=repeats)

    def peak_over(self, step: Step, n_steps: int) -> int:
        """Largest measured peak over consecutive training steps, each followed by an update."""
        peaks = []
        for _ in range(n_steps):
            peaks.append(self.measure(step).peak_bytes)
            with torch.no_grad():
                for parameter in self.case.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
        return max(peaks)


def at_smallest_peak(compile_at: Callable[[int], fxhybrid.HybridModule]) -> fxhybrid.HybridModule:
    """What ``compile_at`` gives for a budget a little above the smallest peak for which there is a plan."""
    try:
        return compile_at(1)
    except fxhybrid.BudgetError as error:
        return compile_at(int(error.minimum_bytes * MARGIN))


def wide_console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def table_of_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Builds a table to print from the rows that documents show, too."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run."""
    start = clock()
    run()
    return clock() - start


def pair_ratios(first: Step, second: Step, n_pairs: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Time of ``second`` over that of ``first``, in pairs run in turn; the order within a pair alternates."""
    first()
    second()
    ratios = []
    gc.collect()
    for i in range(n_pairs):
        if i % 2:
            late = seconds(second, clock)
            ratios.append(late / seconds(first, clock))
        else:
            early = seconds(first, clock)
            ratios.append(seconds(second, clock) / early)
    return ratios


def median_ratio(first: Step, second: Step, n_pairs: int) -> float:
    """Median of :func:`pair_ratios`."""
    return statistics.median(pair_ratios(first, second, n_pairs))


def records_of(
    arguments: argparse.Namespace, run: Callable[[], Iterable[Record]], told: Callable[[Record], str]
) -> list[Record]:
    """What ``--summary`` holds, else what runs now, each record kept in ``--json`` and told as it comes."""
    if arguments.summary:
        return read_records(arguments.summary)
    console, records = wide_console(), []
    for record in run():
        records.append(record)
        append_record(arguments.json, record)
        console.print(told(record), highlight=False)
    return read_records(arguments.json) if arguments.json else records


def add_record_files(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`records_of` reads."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="judge the records of a file; runs nothing")


def with_missing(
    arguments: argparse.Namespace,
    runs: Iterable[tuple[str, Any, Callable[[], Record]]],
    told: Callable[[Record], str],
) -> list[Record]:
    """The records of ``--json`` and of those runs (model, key, what makes the record) that it lacks.

    Each record is kept and told as it comes. No run starts later than after ``--seconds``.
    """
    records = read_records(arguments.json) if arguments.json and arguments.json.exists() else []
    done = {(record["model"], record["key"]) for record in records}
    until = time.monotonic() + arguments.seconds
    for model, key, run in runs:
        if (model, key) in done or time.monotonic() > until:
            continue
        records.append({"model": model, "key": key} | run())
        append_record(arguments.json, records[-1])
        wide_console().print(told(records[-1]), highlight=False)
        torch.compiler.reset()
    return records


def add_slices(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`with_missing` reads."""
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run later than that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file, and read it")


def names_of(text: str | None, known: Iterable[str], what: str) -> list[str]:
    """A comma-separated choice among ``known``; ``None`` is all."""
    known = list(known)
    chosen = known if text is None else text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return chosen
