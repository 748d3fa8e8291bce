"""The demonstration: two small models on real data, unmodified and inside budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fxhybrid.demo.demo_tasks import digits_task, text_task
from fxhybrid.demo.show import plot_runs, runs_table
from fxhybrid.demo.train import Run, train_task
from fxhybrid.optional_imports import require

__all__ = ["Run", "run_demo"]


def run_demo(
    console: Console,
    *,
    shares: Sequence[float] = (0.6, 0.4),
    steps: int | None = None,
    plot: Path | None = None,
) -> list[Run]:
    """Trains each task unmodified and at each budget, prints a table and writes a plot.

    Args:
        console: where progress and table go.
        shares: budgets, as shares of the unmodified step's measured peak.
        steps: training steps per run; ``None`` takes each task's own number.
        plot: where the plot goes; ``None`` writes none.

    Raises:
        InvalidArgument: scikit-learn or matplotlib is not installed.
    """
    for module in ("sklearn.datasets", "matplotlib"):
        require(module, "the demo")  # before minutes of work, not after
    runs: list[Run] = []
    for task in (digits_task(), text_task()):
        console.print(f"[bold]{task.name}[/bold]: {task.about}", highlight=False)
        runs += train_task(task, shares, steps or task.steps, console)
    console.print(runs_table(runs))
    if plot is not None:
        plot_runs(runs, plot)
        console.print(f"plot: {plot}", highlight=False, soft_wrap=True)
    return runs
