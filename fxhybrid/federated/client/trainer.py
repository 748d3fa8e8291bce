"""Local training on a device by the plans it got."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from fxhybrid.federated.client.local_steps import LocalWork, MemoryMonitor, local_steps
from fxhybrid.federated.client.training_reply import LocalResult
from fxhybrid.federated.protocol.messages import Arrays
from fxhybrid.federated.protocol.model_arrays import load_arrays, to_arrays
from fxhybrid.federated.tasks.captured_step import capture_step, make_optimizer
from fxhybrid.federated.tasks.data import ClientData
from fxhybrid.federated.tasks.tasks import Task
from fxhybrid.ir.plan import Plan

RunStep = Callable[[Callable[[], float], Plan], float]


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
        return LocalResult(to_arrays(self.model), losses, used)

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
