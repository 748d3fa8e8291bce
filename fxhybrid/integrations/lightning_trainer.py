"""A callback for Lightning: ``Trainer(callbacks=[FxHybridCallback(budget="2GiB")])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.integrations.planned_forward import PlannedForward, refuse_settings
from fxhybrid.optional_imports import require
from fxhybrid.units import Budget

lightning = require("lightning.pytorch", "the callback for Lightning", extra="lightning")


class FxHybridCallback(lightning.Callback):  # type: ignore[misc, name-defined]
    """Plans a module of the ``LightningModule`` at the first batch, logs the plan's figures, and saves it.

    Figures are logged once per new plan: predicted peak and budget in MiB, added time of a step in milliseconds,
    gradient error. Checkpoints hold the plan as JSON text under ``fxhybrid_plan``.
    """

    def __init__(self, budget: Budget, *, module: str | None = None, **options: Any) -> None:
        """Takes the budget of ``fxhybrid.compile`` and its other options.

        Args:
            budget: limit of the peak.
            module: path of what ``training_step`` calls; None where the LightningModule has one child with parameters.
            options: of ``fxhybrid.compile``; the trainer's first optimizer is the one that counts.
        """
        self.budget, self.module, self.options = budget, module, options
        self.planned: PlannedForward | None = None
        self._logged: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the place of the module's forward.

        Raises:
            InvalidArgument: several modules could be meant, or the trainer needs gradients that the options leave none
                of.
        """
        accumulates, is_scaled = trainer.accumulate_grad_batches > 1, trainer.precision == "16-mixed"
        settings = {"gradient_clip_val": bool(trainer.gradient_clip_val), "precision": is_scaled}
        refuse_settings(self.options, {**settings, "accumulate_grad_batches": accumulates})
        self.planned = PlannedForward(self._target(pl_module), self.budget, self.options)
        self.planned.optimizer = next(iter(trainer.optimizers), None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:  # noqa: ARG002
        """Logs the figures of a plan that is new."""
        figures = {} if self.planned is None else self.planned.figures()
        if figures != self._logged:
            self._logged = figures
            pl_module.log_dict(figures)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Puts the plan into the checkpoint."""
        if self.planned is not None and self.planned.plan is not None:
            checkpoint["fxhybrid_plan"] = self.planned.plan.to_json()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Gives the module its own forward back."""
        if self.planned is not None:
            self.planned.remove()

    def _target(self, pl_module: nn.Module) -> nn.Module:
        if self.module is not None:
            return pl_module.get_submodule(self.module)
        found = [name for name, part in pl_module.named_children() if next(part.parameters(), None) is not None]
        if len(found) != 1:
            raise InvalidArgument(
                f"the LightningModule has {len(found)} children with parameters ({', '.join(found)}); name the one "
                'that training_step calls: FxHybridCallback(budget, module="...")'
            )
        return pl_module.get_submodule(found[0])
