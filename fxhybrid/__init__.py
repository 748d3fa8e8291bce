"""fxhybrid: train an unchanged PyTorch model inside a memory budget.

import fxhybrid
model = fxhybrid.compile(model, budget="512MiB", loss_fn=loss_fn)
model(x, loss_args=(y,)).backward()
"""

from fxhybrid.api import compile, largest_batch, plan
from fxhybrid.devices.device_profile import DeviceProfile
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
from fxhybrid.frontier import Frontier, frontier
from fxhybrid.ir.plan import Plan
from fxhybrid.module import HybridModule
from fxhybrid.profiling.allocator import StepMeasurement, measure_step
from fxhybrid.version import __version__

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
