"""Local training on a device by the plans it got."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxhybrid.federated.client.local_steps import LocalWork, MemoryMonitor, local_steps
from fxhybrid.federated.protocol.compact_updates import BITS, pack_update
from fxhybrid.federated.protocol.messages import Arrays, Request
from fxhybrid.federated.protocol.model_arrays import load_arrays, to_arrays
from fxhybrid.federated.tasks.captured_step import capture_step, make_optimizer
from fxhybrid.federated.tasks.data import ClientData
from fxhybrid.federated.tasks.tasks import Task
from fxhybrid.ir.plan import Plan

RunStep = Callable[[Callable[[], float], Plan], float]


@dataclass(frozen=True)
class LocalResult:
    """Holds the result of local training.

    Attributes:
        arrays: the trained model.
        loss: mean over the local steps.
        squared_loss: mean of the steps' squared losses: Oort's data utility, taken per batch instead of per example.
        plans: what each step ran by; fewer than asked for where memory or time ran short.
    """

    arrays: Arrays
    loss: float
    squared_loss: float
    plans: tuple[Plan, ...]

    @classmethod
    def of(cls, arrays: Arrays, losses: Sequence[float], plans: Sequence[Plan]) -> LocalResult:
        """Makes the result of steps with these losses, by these plans."""
        squared = sum(loss * loss for loss in losses) / len(losses)
        return cls(arrays, sum(losses) / len(losses), squared, tuple(plans))

    @property
    def peak_bytes(self) -> int:
        """Returns the largest planned peak among the plans that ran."""
        return max(plan.peak_bytes for plan in self.plans)

    @property
    def n_steps(self) -> int:
        """Counts the steps."""
        return len(self.plans)

    @property
    def n_moves(self) -> int:
        """Counts how often the plan changed."""
        return sum(before is not after for before, after in itertools.pairwise(self.plans))

    @property
    def planned_s(self) -> float:
        """Returns the seconds that the plans predict for all steps, on a device that is not slowed down."""
        return sum(plan.step_s + plan.added_s for plan in self.plans)


class Trainer:
    """Trains one model by its planned step; serves one device at a time."""

    def __init__(self, task: Task, width: float = 1.0, *, plan: Plan | None = None) -> None:
        """Captures and compiles the step.

        Args:
            task: what to train.
            width: of the model.
            plan: to carry out first; without one, all plans for this device are made.
        """
        self.task = task
        self.model, self.hybrid = capture_step(task, width, plan=plan)

    def train(self, arrays: Arrays, work: LocalWork, data: ClientData, monitor: MemoryMonitor) -> LocalResult:
        """Trains ``arrays`` on the data, step by step as memory and time allow.

        Raises:
            PlanMismatchError: a plan belongs to another graph.
            MemoryError: memory ran out, or there was never enough for the smallest plan.
        """
        return self.train_by(local_steps(work, monitor), arrays, work, data, monitor.run_step)

    def train_by(
        self,
        plans: Iterable[Plan],
        arrays: Arrays,
        work: LocalWork,
        data: ClientData,
        run_step: RunStep = lambda step, _: step(),
    ) -> LocalResult:
        """Trains ``arrays`` by the given plans, one for each step."""
        load_arrays(self.model, arrays)
        self.model.train()
        optimizer = make_optimizer(self.task, self.model)
        start = [p.detach().clone() for p in self.model.parameters()] if work.mu else []
        batches = data.batches(self.task.batch_size, work.seed)
        losses: list[float] = []
        used: list[Plan] = []
        for plan in plans:
            self.hybrid.use_plan(plan)
            inputs, targets = next(batches)
            losses.append(run_step(lambda x=inputs, y=targets: self._gradients(x, y), plan))  # type: ignore[misc]
            self._update(optimizer, start, work.mu)
            used.append(plan)
        return LocalResult.of(to_arrays(self.model), losses, used)

    def _gradients(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        self.model.zero_grad()
        loss = self.hybrid(inputs, loss_args=(targets,))
        loss.backward()
        return float(loss.detach())

    def _update(self, optimizer: torch.optim.Optimizer, start: Sequence[torch.Tensor], mu: float) -> None:
        with torch.no_grad():
            for parameter, origin in zip(self.model.parameters(), start, strict=False):
                if parameter.grad is not None:  # FedProx: the gradient of mu/2 ||w - origin||^2
                    parameter.grad.add_(parameter - origin, alpha=mu)
        optimizer.step()
        optimizer.zero_grad()


def packed(request: Request, arrays: Arrays) -> Arrays:
    """Packs a trained model as the request asks for it."""
    return pack_update(arrays, request.arrays) if request.payload.get("update_bits") == BITS else arrays


def training_payload(
    result: LocalResult, n_examples: int, *, steps_s: float, busy_s: float, readings: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Makes what a device reports about its training in addition to the model.

    Args:
        result: of the training.
        n_examples: that the device holds.
        steps_s: that the steps took.
        busy_s: from the request's arrival to the reply's sending.
        readings: of memory since the request, as times on the server's clock and bytes.
    """
    return {
        "n_examples": n_examples,
        "loss": result.loss,
        "squared_loss": result.squared_loss,
        "peak_bytes": result.peak_bytes,
        "n_moves": result.n_moves,
        "n_steps": result.n_steps,
        "slowdown": steps_s / result.planned_s,
        "busy_s": busy_s,
        "readings": [list(reading) for reading in readings],
    }
