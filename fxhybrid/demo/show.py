"""The demo's table and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fxhybrid.demo.train import Run
from fxhybrid.optional_imports import require
from fxhybrid.units import format_bytes

SMOOTHED = 0.9  # weight of the past in the plotted loss
MIB = 1 << 20


def runs_table(runs: Sequence[Run]) -> Table:
    """Makes one row per run."""
    table = Table(title="Training inside a memory budget", caption="step time: median of interleaved pairs")
    for name in ("task", "budget", "measured peak", "step time", "held-out loss", "accuracy", "actions"):
        table.add_column(name, justify="left" if name in ("task", "actions") else "right")
    for run in runs:
        over = run.budget_bytes is not None and run.peak_bytes > run.budget_bytes
        peak = f"{format_bytes(run.peak_bytes)} ({run.peak_bytes / run.eager_peak_bytes:.0%})"
        table.add_row(
            run.task,
            budget_text(run),
            f"[red]{peak}[/red]" if over else peak,
            f"{run.step_ratio:.2f} x",
            f"{run.loss:.3f}",
            f"{run.accuracy:.1%}",
            run.actions,
            end_section=run is runs[-1] or run.task != runs[runs.index(run) + 1].task,
        )
    return table


def budget_text(run: Run) -> str:
    """Writes the budget in words; says where the share asked for was out of reach."""
    if run.budget_bytes is None or run.share is None:
        return "none"
    got = run.budget_bytes / run.eager_peak_bytes
    note = "" if got < run.share + 0.005 else f", {run.share:.0%} is out of reach"
    return f"{format_bytes(run.budget_bytes)} ({got:.0%}{note})"


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Writes training losses and measured peaks, a row per task; the suffix says the format."""
    require("matplotlib", "a plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "a plot")
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=(10, 3.6 * len(tasks)), layout="constrained", squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=True):
        own = [run for run in runs if run.task == task]
        for place, run in enumerate(own):
            name = "unmodified" if run.budget_bytes is None else f"budget {budget_text(run)}"
            left.plot(_smooth(run.losses), label=name, color=f"C{place}")
            right.bar(place, run.peak_bytes / MIB, color=f"C{place}")
            if run.budget_bytes is not None:
                right.plot([place - 0.45, place + 0.45], [run.budget_bytes / MIB] * 2, color="black")
        left.set(title=f"{task}: training loss (smoothed)", xlabel="step")
        left.legend(fontsize="small")
        right.set(title="measured peak of a step, MiB (line: budget)")
        right.set_xticks(range(len(own)), ["none" if run.share is None else f"{run.share:.0%}" for run in own])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(losses: Sequence[float]) -> list[float]:
    smoothed = list(losses[:1])
    for loss in losses[1:]:
        smoothed.append(SMOOTHED * smoothed[-1] + (1 - SMOOTHED) * loss)
    return smoothed
