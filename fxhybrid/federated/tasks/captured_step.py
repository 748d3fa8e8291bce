"""A task's training step, captured and planned on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fxhybrid.api import compile
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.tasks.adam8bit import Adam8bit
from fxhybrid.federated.tasks.tasks import Task
from fxhybrid.ir.plan import Plan
from fxhybrid.module import HybridModule
from fxhybrid.suite.sample_data import Batch

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adam8bit": Adam8bit,
}


def capture_step(task: Task, width: float = 1.0, *, plan: Plan | None = None) -> tuple[nn.Module, HybridModule]:
    """Makes the task's model at a width, and compiles it; see ``capture_model``."""
    model = task.make_model(width)
    return model, capture_model(model, task.loss_fn, make_optimizer(task, model), task.example(), plan=plan)


def capture_model(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    plan: Plan | None = None,
) -> HybridModule:
    """Compiles a training step without a limit: what plans are made from and run on.

    Args:
        model: to train.
        loss_fn: ``loss_fn(output, target)``.
        optimizer: whose state counts.
        batch: inputs and targets, of the shape that every step has.
        plan: to carry out; without one, all plans for this device are made.
    """
    return compile(
        model,
        budget=1.0,
        example_inputs=(batch[0],),
        loss_fn=loss_fn,
        loss_args=(batch[1],),
        optimizer=optimizer,
        solver="mps",
        plan=plan,
    )


def make_optimizer(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """Makes the task's optimizer with fresh state.

    Raises:
        InvalidArgument: the task names another one.
    """
    if task.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise InvalidArgument(f"optimizer of task {task.name!r} is {task.optimizer!r}; there are {known}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OPTIMIZERS[task.optimizer](trained, lr=task.learning_rate)
