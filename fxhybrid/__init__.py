"""fxhybrid: train an unchanged PyTorch model inside a memory budget.

import fxhybrid
model = fxhybrid.compile(model, budget="512MiB", loss_fn=loss_fn)
model(x, loss_args=(y,)).backward()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxhybrid.errors import (
    BackwardError,
    BudgetError,
    CaptureError,
    CodecError,
    FxHybridError,
    InvalidArgument,
    PlanError,
    PlanMismatchError,
    ProblemError,
    ProfileError,
)
from fxhybrid.version import __version__

if TYPE_CHECKING:
    from fxhybrid.api import compile, largest_batch, plan
    from fxhybrid.budget_sweep import Frontier, frontier
    from fxhybrid.devices.device_profile import DeviceProfile
    from fxhybrid.ir.plan import Plan
    from fxhybrid.module import HybridModule
    from fxhybrid.profiling.allocator import StepMeasurement, measure_step

__all__ = [
    "BackwardError",
    "BudgetError",
    "CaptureError",
    "CodecError",
    "DeviceProfile",
    "Frontier",
    "FxHybridError",
    "HybridModule",
    "InvalidArgument",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "ProblemError",
    "ProfileError",
    "StepMeasurement",
    "__version__",
    "compile",
    "frontier",
    "largest_batch",
    "measure_step",
    "plan",
]

# Imported at first use: torch and its compiler take seconds, and what only reads or forecasts memory needs neither.
_HOMES = {
    "DeviceProfile": "devices.device_profile",
    "Frontier": "budget_sweep",
    "HybridModule": "module",
    "Plan": "ir.plan",
    "StepMeasurement": "profiling.allocator",
    "compile": "api",
    "frontier": "budget_sweep",
    "largest_batch": "api",
    "measure_step": "profiling.allocator",
    "plan": "api",
}


def __getattr__(name: str) -> Any:
    """Looks up a public name where it is defined, and keeps it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Lists the public names, imported or not, as completion at a prompt wants them."""
    return sorted({*globals(), *__all__})
