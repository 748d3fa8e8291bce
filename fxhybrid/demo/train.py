"""Trains one task unmodified and inside budgets, and measures each run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from fxhybrid.api import compile
from fxhybrid.console import progress_bar
from fxhybrid.demo.demo_tasks import Task
from fxhybrid.errors import BudgetError
from fxhybrid.module import HybridModule
from fxhybrid.profiling.allocator import StepMeasurement, measure_step
from fxhybrid.suite.sample_data import Batch
from fxhybrid.suite.small_models import evaluate

MARGIN = 1.02  # over the smallest known peak, where a share is out of reach
PAIRS = 11


@dataclass(frozen=True)
class Run:
    """Describes one training run.

    Attributes:
        task: the task's name.
        share: budget asked for, as a share of the unmodified peak; None for the unmodified run.
        budget_bytes: the budget; None for the unmodified run.
        peak_bytes: measured peak of a step.
        eager_peak_bytes: measured peak of an unmodified step.
        step_ratio: step time against unmodified, median over interleaved pairs.
        loss: final mean cross entropy on held-out data.
        accuracy: final share of right predictions on held-out data.
        actions: how many tensors each kind of action was chosen for, in words.
        losses: training loss of each step.
    """

    task: str
    share: float | None
    budget_bytes: int | None
    peak_bytes: int
    eager_peak_bytes: int
    step_ratio: float
    loss: float
    accuracy: float
    actions: str
    losses: tuple[float, ...]


def train_task(task: Task, shares: Sequence[float], steps: int, console: Console) -> list[Run]:
    """Trains one unmodified run, then one per share of its measured peak."""
    runs = [_train(task, None, 0, steps, console)]
    eager_peak_bytes = runs[0].peak_bytes
    return runs + [_train(task, share, eager_peak_bytes, steps, console) for share in shares]


def _train(task: Task, share: float | None, eager_peak_bytes: int, steps: int, console: Console) -> Run:
    model = task.make_model()
    optimizer = task.make_optimizer(model)
    batch = next(task.batches())
    label = f"{task.name}, unmodified" if share is None else f"{task.name}, budget {share:.0%}"
    trained: nn.Module = model
    if share is not None:
        with console.status(f"{label}: compiling"):
            trained = _compiled(task, model, optimizer, int(share * eager_peak_bytes), batch)
    losses = _fit(task, trained, optimizer, steps, label, console)
    score = evaluate(model, task.loss_fn, task.held_out)
    with console.status(f"{label}: measuring"):
        measured = _measure(step_of(task, trained, batch), model, optimizer, batch)
        ratio = 1.0 if trained is model else _step_ratio(task, model, trained, batch)
    plan = trained.plan if isinstance(trained, HybridModule) else None
    actions = ", ".join(f"{n} {kind}" for kind, n in plan.counts().items()) if plan else ""
    return Run(
        task=task.name,
        share=share,
        budget_bytes=plan.budget_bytes if plan else None,
        peak_bytes=measured.peak_bytes,
        eager_peak_bytes=eager_peak_bytes or measured.peak_bytes,
        step_ratio=ratio,
        loss=score.loss,
        accuracy=score.accuracy,
        actions=actions or "everything saved",
        losses=losses,
    )


def _compiled(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, budget_bytes: int, batch: Batch
) -> HybridModule:
    """Compiles the model for this budget, or for the smallest one in reach."""
    inputs, target = batch

    def at(n_bytes: int) -> HybridModule:
        return compile(
            model,
            budget=n_bytes,
            example_inputs=(inputs,),
            loss_fn=task.loss_fn,
            loss_args=(target,),
            optimizer=optimizer,
        )

    try:
        return at(budget_bytes)
    except BudgetError as error:
        return at(int(error.minimum_bytes * MARGIN))


def step_of(task: Task, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Makes a step: forward and backward of one batch with fresh gradients; returns the loss."""
    inputs, target = batch

    def step() -> Tensor:
        model.zero_grad()
        if isinstance(model, HybridModule):
            loss: Tensor = model(inputs, loss_args=(target,))
        else:
            loss = task.loss_fn(model(inputs), target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return step


def _fit(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    label: str,
    console: Console,
) -> tuple[float, ...]:
    losses: list[float] = []
    with progress_bar("loss {task.fields[loss]:.3f}", console=console) as bar:
        progress = bar.add_task(label, total=steps, loss=float("nan"))
        for _, batch in zip(range(steps), task.batches(), strict=False):
            losses.append(step_of(task, model, batch)().item())
            optimizer.step()
            bar.update(progress, advance=1, loss=losses[-1])
    return tuple(losses)


def _measure(
    step: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> StepMeasurement:
    """Measures a step as a training loop has it: the optimizer's state is there, old gradients are not."""
    return measure_step(step, modules=model, tensors=batch, optimizer=optimizer, repeats=0)


def _step_ratio(task: Task, model: nn.Module, trained: nn.Module, batch: Batch) -> float:
    unmodified, hybrid = step_of(task, model, batch), step_of(task, trained, batch)
    pairs = [(seconds(unmodified), seconds(hybrid)) for _ in range(PAIRS + 1)][1:]
    return statistics.median(h / u for u, h in pairs)


def seconds(step: Callable[[], object]) -> float:
    """Measures the seconds of one run."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
