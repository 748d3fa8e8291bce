"""Tasks by name, as the command line and a run's configuration give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.tasks.lora import lora_task
from fxhybrid.federated.tasks.tasks import Task, digits_task, text_task
from fxhybrid.optional_imports import load_function

TASKS: Mapping[str, Callable[..., Task]] = {"digits": digits_task, "text": text_task, "lora": lora_task}


def load_task(name: str, n_clients: int, seed: int) -> Task:
    """Makes the task of a name, the same on server and devices.

    Args:
        name: of ``TASKS``, or ``package.module:make_task``, which is called as ``make_task(n_clients, seed=seed)``.
        n_clients: how many share the data.
        seed: of the split and the initial weights.

    Raises:
        InvalidArgument: there is none of that name, or the function makes something else.
    """
    if ":" not in name and name not in TASKS:
        raise InvalidArgument(f"there is no task {name!r}; give package.module:make_task, or one of {', '.join(TASKS)}")
    make = TASKS[name] if name in TASKS else load_function(name)
    try:
        inspect.signature(make).bind(n_clients, seed=seed)
    except TypeError as error:
        raise InvalidArgument(f"{name} cannot be called as {name}({n_clients}, seed={seed}): {error}") from error
    task = make(n_clients, seed=int(seed))
    if not isinstance(task, Task):
        raise InvalidArgument(f"{name} must return a Task; it returned a {type(task).__name__}")
    return task
