"""A task's training step, captured and planned on this device."""

from __future__ import annotations

import torch
from torch import nn

from fxhybrid.api import compile
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.tasks.tasks import Task
from fxhybrid.ir.plan import Plan
from fxhybrid.module import HybridModule


def capture_step(task: Task, width: float = 1.0, *, plan: Plan | None = None) -> tuple[nn.Module, HybridModule]:
    """Makes the task's model at a width, and compiles it without a limit: what plans are made from and run on.

    Args:
        task: model, loss and an example batch.
        width: of the model.
        plan: to carry out; without one, all plans for this device are made.
    """
    model = task.make_model(width)
    inputs, targets = task.example()
    hybrid = compile(
        model,
        budget=1.0,
        example_inputs=(inputs,),
        loss_fn=task.loss_fn,
        loss_args=(targets,),
        optimizer=make_optimizer(task, model),
        solver="mps",
        plan=plan,
    )
    return model, hybrid


def make_optimizer(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """Makes the task's optimizer with fresh state.

    Raises:
        InvalidArgument: the task names another one.
    """
    if task.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=task.learning_rate)
    if task.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    raise InvalidArgument(f'optimizer of task {task.name!r} is {task.optimizer!r}; it must be "sgd" or "adam"')
