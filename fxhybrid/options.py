"""What a user asked for: names, defaults, checks and one-line descriptions of all options, each once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_type_hints

import torch

from fxhybrid.capture.step import Loss
from fxhybrid.errors import InvalidArgument
from fxhybrid.solvers.base import Solver
from fxhybrid.units import CheckedBudget, check_budget, check_bytes

SOLVERS = ("auto", "mps", "ilp")
COMPRESSIONS = ("auto", "lossless", "off")
REORDERED = "reordered"
BACKENDS = ("eager",)  # under Inductor the fused kernels' memory is not what the simulator adds up

Check = Callable[[str, Any], Any]


def _check_budget(_: str, value: Any) -> CheckedBudget:
    return check_budget(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InvalidArgument(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
    return str(value)


def _check_exact(name: str, value: Any) -> str | None:
    if value not in (None, REORDERED):
        raise InvalidArgument(f"{name} is {value!r}; it must be {REORDERED!r}, or None for what compression allows")
    return value  # type: ignore[no-any-return]


def _check_solver(name: str, value: Any) -> str | Solver:
    if isinstance(value, str):
        return _check_choice(name, value, SOLVERS)
    if not hasattr(value, "solve"):
        raise InvalidArgument(f"{name} is {value!r}; it must be one of {SOLVERS} or have a solve method")
    return value  # type: ignore[no-any-return]


def _check_loss(name: str, value: Any) -> Loss | None:
    if value is not None and not callable(value):
        raise InvalidArgument(f"{name} is {value!r}; it must be callable: loss_fn(output, *loss_args) -> scalar")
    return value  # type: ignore[no-any-return]


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} is {value!r}; it must be True or False")
    return value


def _check_optimizer(name: str, value: Any) -> torch.optim.Optimizer | None:
    if value is not None and not isinstance(value, torch.optim.Optimizer):
        raise InvalidArgument(f"{name} is {value!r}; it must be a torch.optim.Optimizer or None")
    return value


def _check_error(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(f"{name} is {value!r}; it must be a number of at least 0")
    if not math.isfinite(value) or value < 0:
        raise InvalidArgument(f"{name} is {value!r}; it must be finite and at least 0")
    return float(value)


def _check_interval(name: str, value: Any) -> int | None:
    if value is not None and not (type(value) is int and value > 0):
        raise InvalidArgument(f"{name} is {value!r}; it must be a positive int or None")
    return value


def _check_dynamic(name: str, value: Any) -> Mapping[str, Mapping[int, int]] | None:
    if value is None:
        return None
    right = isinstance(value, Mapping) and all(
        isinstance(argument, str) and isinstance(dims, Mapping) and all(map(_is_size, dims.items()))
        for argument, dims in value.items()
    )
    if not right:
        raise InvalidArgument(
            f'{name} is {value!r}; it must be like {{"input_ids": {{1: 512}}}}: largest size by dimension'
        )
    return {argument: dict(dims) for argument, dims in value.items()}


def _is_size(item: tuple[Any, Any]) -> bool:
    dim, size = item
    return type(dim) is int and dim >= 0 and type(size) is int and size > 0


@dataclass(frozen=True)
class Option:
    """Describes an option.

    Attributes:
        about: what it is, in a line; the command line's help.
        check: takes name and value, and returns the value to keep or raises ``InvalidArgument``.
    """

    about: str
    check: Check


@dataclass(frozen=True, kw_only=True)
class Options:
    """Holds the parameters of ``fxhybrid.compile`` that hold for every signature; checked whenever made."""

    budget: Annotated[
        CheckedBudget,
        Option("bytes, text such as 512MiB, a share such as 0.6 or 60%, auto, smallest", _check_budget),
    ]
    loss_fn: Annotated[Loss | None, Option("traced on top of the model", _check_loss)] = None
    return_outputs: Annotated[bool, Option("return the outputs in addition to the loss", _check_flag)] = False
    optimizer: Annotated[torch.optim.Optimizer | None, Option("whose state counts", _check_optimizer)] = None
    accumulate: Annotated[bool, Option("gradients are added up over several calls", _check_flag)] = False
    step_in_backward: Annotated[bool, Option("the backward pass updates parameters", _check_flag)] = False
    reserve_bytes: Annotated[int, Option("kept free for whatever else the process holds", check_bytes)] = 0
    solver: Annotated[str | Solver, Option("what searches plans", _check_solver)] = "auto"
    compression: Annotated[str, Option("which codecs may be used", partial(_check_choice, choices=COMPRESSIONS))] = (
        "auto"
    )
    exact: Annotated[
        str | None, Option("reordered: equal to eager but for rounding; no lossy codecs", _check_exact)
    ] = None
    max_grad_error: Annotated[float, Option("limit of the relative gradient error", _check_error)] = 0.1
    backend: Annotated[str, Option("what runs the graphs", partial(_check_choice, choices=BACKENDS))] = "eager"
    check_error_every: Annotated[
        int | None, Option("training steps between checks of the gradient error; None for no check", _check_interval)
    ] = None
    dynamic: Annotated[
        Mapping[str, Mapping[int, int]] | None,
        Option("largest size of each argument's dimensions that change, which is planned first", _check_dynamic),
    ] = None

    def __post_init__(self) -> None:
        """Checks every option.

        Raises:
            InvalidArgument: names the option, its value and what it may be.
        """
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(name, getattr(self, name)))
        if self.return_outputs and self.loss_fn is None:
            raise InvalidArgument("return_outputs=True needs a loss_fn; without one the outputs are returned anyway")
        if self.step_in_backward and self.optimizer is None:
            raise InvalidArgument("step_in_backward=True needs an optimizer: pass optimizer=")
        if self.step_in_backward and self.accumulate:
            raise InvalidArgument(
                "step_in_backward=True updates parameters in every backward pass, so that no gradients are left to add "
                "up; leave it out, or accumulate"
            )

    @property
    def lossy(self) -> bool:
        """Whether lossy codecs may be used."""
        return self.compression == "auto" and self.max_grad_error > 0 and self.exact is None

    @property
    def reordered(self) -> bool:
        """Whether kernels may be used that take sums in another order than eager's, or round otherwise."""
        return self.lossy or self.exact == REORDERED

    @classmethod
    def checked(cls, **given: Any) -> Options:
        """Makes options of keyword arguments.

        Raises:
            InvalidArgument: there is no such option; or as making one directly does.
        """
        check_names(given, tuple(OPTIONS))
        return cls(**given)


OPTIONS: dict[str, Option] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}


def check_names(given: Iterable[str], known: tuple[str, ...]) -> None:
    """Refuses options that there are not.

    Raises:
        InvalidArgument: names them, and those that there are.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidArgument(f"no option {', '.join(unknown)}; there are {', '.join(known)}")
