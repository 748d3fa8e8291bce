"""What a user asked for, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fxhybrid.capture.step import Loss
from fxhybrid.errors import InvalidArgument
from fxhybrid.solvers.base import Solver
from fxhybrid.units import Budget, check_budget, check_bytes

SOLVERS = ("auto", "mps", "ilp")
COMPRESSIONS = ("auto", "lossless", "off")
BACKENDS = ("eager",)  # under Inductor the fused kernels' memory is not what the simulator adds up


@dataclass(frozen=True)
class Options:
    """The parameters of ``fxhybrid.compile`` that hold for every signature.

    Attributes:
        budget: bytes (int) or a share of the save-all peak (float).
        loss_fn: traced on top of the model.
        return_outputs: return the outputs beside the loss.
        optimizer: whose state counts.
        reserve_bytes: kept free for whatever else the process holds.
        solver: name or object.
        compression: which codecs may be used.
        max_grad_error: limit of the relative gradient error.
        backend: what runs the graphs.
        check_error_every: training steps from one check of the gradient error to the next; None for none.
    """

    budget: int | float
    loss_fn: Loss | None
    return_outputs: bool
    optimizer: torch.optim.Optimizer | None
    reserve_bytes: int
    solver: str | Solver
    compression: str
    max_grad_error: float
    backend: str
    check_error_every: int | None = None


def make_options(
    *,
    budget: Budget,
    loss_fn: Loss | None = None,
    return_outputs: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    reserve_bytes: int = 0,
    solver: str | Solver = "auto",
    compression: str = "auto",
    max_grad_error: float = 0.1,
    backend: str = "eager",
    check_error_every: int | None = None,
) -> Options:
    """Checked options.

    Raises:
        InvalidArgument: names the parameter, its value and what it may be.
    """
    if isinstance(solver, str):
        _check_choice("solver", solver, SOLVERS)
    elif not hasattr(solver, "solve"):
        raise InvalidArgument(f"solver is {solver!r}; it must be one of {SOLVERS} or have a solve method")
    _check_choice("compression", compression, COMPRESSIONS)
    _check_choice("backend", backend, BACKENDS)
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidArgument(f"loss_fn is {loss_fn!r}; it must be callable: loss_fn(output, *loss_args) -> scalar")
    if return_outputs and loss_fn is None:
        raise InvalidArgument("return_outputs=True needs a loss_fn; without one the outputs are returned anyway")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(f"optimizer is {optimizer!r}; it must be a torch.optim.Optimizer or None")
    if isinstance(max_grad_error, bool) or not isinstance(max_grad_error, (int, float)):
        raise InvalidArgument(f"max_grad_error is {max_grad_error!r}; it must be a number of at least 0")
    if not math.isfinite(max_grad_error) or max_grad_error < 0:
        raise InvalidArgument(f"max_grad_error is {max_grad_error!r}; it must be finite and at least 0")
    counted = check_error_every is None or (type(check_error_every) is int and check_error_every > 0)
    if not counted:
        raise InvalidArgument(f"check_error_every is {check_error_every!r}; it must be a positive int or None")
    return Options(
        check_budget(budget),
        loss_fn,
        return_outputs,
        optimizer,
        check_bytes("reserve_bytes", reserve_bytes),
        solver,
        compression,
        float(max_grad_error),
        backend,
        check_error_every,
    )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidArgument(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
