"""Plans a model where it is: trainers keep the object that they were given, so only its ``forward`` is replaced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxhybrid.api import compile
from fxhybrid.errors import InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.module import HybridModule
from fxhybrid.options import OPTIONS, check_names
from fxhybrid.units import Budget

# Hooks stay with the model itself: it runs them around this forward.
OWN = frozenset({"forward", "_original_forward", *(name for name in vars(nn.Module()) if "hooks" in name)})
ACCEPTED = (*(name for name in OPTIONS if name not in ("budget", "loss_fn", "return_outputs", "optimizer")), "plan")
MIB = 2**20


def refuse_settings(options: Mapping[str, Any], settings: Mapping[str, bool]) -> None:
    """Refuses settings of a trainer that need gradients after the backward pass, where none are left then.

    Args:
        options: of ``fxhybrid.compile``.
        settings: by what the trainer calls them, whether they are on.

    Raises:
        InvalidArgument: names them.
    """
    found = [name for name, is_on in settings.items() if is_on]
    if options.get("step_in_backward") and found:
        raise InvalidArgument(
            f"step_in_backward=True leaves no gradients for {' and '.join(found)} of the trainer; turn that off, or "
            "leave step_in_backward out"
        )


class PlannedForward:
    """Stands in the place of a model's ``forward``, with its signature; plans at the first training call.

    Attributes:
        hybrid: the compiled module; None before the first call.
        optimizer: the one whose state counts against the budget.
    """

    def __init__(self, model: nn.Module, budget: Budget, options: Mapping[str, Any]) -> None:
        """Takes its place in ``model``.

        Args:
            model: whose forward is replaced on the instance; its parameters, hooks and attributes stay.
            budget: as ``fxhybrid.compile`` takes it.
            options: further ones.

        Raises:
            InvalidArgument: an option that there is not, or a model that is compiled already.
        """
        check_names(options, ACCEPTED)
        if isinstance(model, HybridModule):
            raise InvalidArgument("the model is compiled already; leave out the callback, or pass the plain model")
        self.hybrid: HybridModule | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._model, self._budget, self._options = model, budget, dict(options)
        self._twin: nn.Module = object.__new__(type(model))
        object.__setattr__(self._twin, "__dict__", {**vars(nn.Module()), **self._shared(model)})
        self.__signature__ = inspect.signature(model.forward)
        object.__setattr__(model, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a call by the plan where it is a training step, else the model as it is."""
        vars(self._twin).update(self._shared(self._model))
        if self.hybrid is None:
            self.hybrid = compile(self._twin, budget=self._budget, optimizer=self.optimizer, **self._options)
        try:
            return self.hybrid(*args, **kwargs)
        finally:
            vars(self._model).update(self._shared(self._twin))

    @property
    def plan(self) -> Plan | None:
        """The plan of the last training step; None before the first one."""
        return self.hybrid.plan if self.hybrid is not None and self.hybrid.plans else None

    def figures(self) -> dict[str, float]:
        """Returns what a trainer's logger is told: predicted peak, added time, gradient error."""
        plan = self.plan
        if plan is None:
            return {}
        return {
            "fxhybrid/peak_mib": plan.peak_bytes / MIB,
            "fxhybrid/budget_mib": plan.budget_bytes / MIB,
            "fxhybrid/overhead_ms": plan.added_s * 1e3,
            "fxhybrid/gradient_error": plan.gradient_error.value,
        }

    def remove(self) -> None:
        """Gives the model its own forward back."""
        vars(self._model).pop("forward", None)

    @staticmethod
    def _shared(model: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(model).items() if name not in OWN}
