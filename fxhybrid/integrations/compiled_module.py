"""One budget for a whole call of a module that ``torch.compile(module, backend="fxhybrid")`` returns.

Torch shows a backend one graph at a time, while the call that it belongs to is under way: too late to plan the step. So
such a module runs by ``fxhybrid.compile`` from its first call on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxhybrid.api import compile
from fxhybrid.capture.outer_context import refuse_wrapper
from fxhybrid.compiler.report import Report
from fxhybrid.errors import InvalidArgument
from fxhybrid.ir.plan import Plan
from fxhybrid.module import HybridModule
from fxhybrid.torch_internals import OptimizedModule, innermost_backend
from fxhybrid.units import Budget

OptionsOf = Callable[[Any], dict[str, Any] | None]
_INITIALIZE = "_initialize"


class PlannedCompiledModule(OptimizedModule):
    """Is what ``torch.compile`` returns for a module, with the plan of its step."""

    @property
    def hybrid(self) -> HybridModule:
        """The planned module, which ``forward`` calls."""
        forward: Any = self.forward
        planned: HybridModule = forward.__self__
        return planned

    @property
    def plan(self) -> Plan:
        """The plan of the last call."""
        return self.hybrid.plan

    def report(self) -> Report:
        """Reports what was planned, for all graphs of the step."""
        return self.hybrid.report()

    def set_budget(self, budget: Budget) -> None:
        """Moves to another budget between two steps.

        Raises:
            BudgetError: no known plan fits.
        """
        self.hybrid.set_budget(budget)


def plan_whole_modules(options_of: OptionsOf) -> None:
    """Has modules that ``torch.compile`` makes for a backend planned as a whole; all others stay as they are.

    Args:
        options_of: returns ``fxhybrid.compile``'s arguments for a backend; None for one that is not ours.
    """
    torchs_own = getattr(OptimizedModule, _INITIALIZE)

    def initialize(self: Any) -> None:
        torchs_own(self)
        model, context = self._orig_mod, self.dynamo_ctx
        if context.fullgraph or not callable(context.callback) or _is_wrapped(model):
            return
        options = options_of(innermost_backend(context.callback))
        if options is not None:
            self.__class__ = PlannedCompiledModule
            self.forward = compile(model, **options).__call__

    setattr(OptimizedModule, _INITIALIZE, initialize)


def _is_wrapped(model: nn.Module) -> bool:
    """Says whether a model is in a wrapper that works between its graphs, so that no one plan would be right."""
    try:
        refuse_wrapper(model)
    except InvalidArgument:
        return True
    return False
