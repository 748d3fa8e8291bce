"""A callback for transformers' ``Trainer(..., callbacks=[FxHybridCallback(budget="2GiB")])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxhybrid.integrations.planned_forward import PlannedForward, refuse_settings
from fxhybrid.optional_imports import require
from fxhybrid.units import Budget

transformers = require("transformers", "the callback for transformers' Trainer", extra="hf")
PLAN_FILE = "fxhybrid_plan.json"


class FxHybridCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Plans the trainer's model at the first batch, logs the plan's figures, and saves it beside each checkpoint.

    Figures are added to every record of ``state.log_history``: predicted peak and budget in MiB, added time of a step
    in milliseconds, gradient error. A checkpoint's folder gets the plan as ``fxhybrid_plan.json``, which
    ``Plan.load`` reads and ``plan=`` takes.
    """

    def __init__(self, budget: Budget, **options: Any) -> None:
        """Takes the budget of ``fxhybrid.compile`` and its other options, ``plan`` among them.

        The trainer's optimizer is the one that counts against the budget.
        """
        self.budget, self.options = budget, options
        self.planned: PlannedForward | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Takes the place of the model's forward, before the trainer wraps it for mixed precision."""
        self.planned = PlannedForward(model, self.budget, self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Notes the optimizer.

        Raises:
            InvalidArgument: the trainer needs gradients that the options leave none of.
        """
        accumulates = args.gradient_accumulation_steps > 1
        settings = {"max_grad_norm": bool(args.max_grad_norm), "fp16": args.fp16}
        refuse_settings(self.options, {**settings, "gradient_accumulation_steps": accumulates})
        if self.planned is not None:
            self.planned.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Adds the plan's figures to what is logged."""
        figures = {} if self.planned is None else self.planned.figures()
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Saves the plan in the folder of the checkpoint."""
        plan = None if self.planned is None else self.planned.plan
        if plan is not None and state.is_world_process_zero:
            plan.save(Path(args.output_dir, f"checkpoint-{state.global_step}", PLAN_FILE))
