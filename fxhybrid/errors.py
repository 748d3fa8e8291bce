"""Every error that fxhybrid raises on purpose.

FxHybridError
├── InvalidArgument   a parameter's value cannot be used (also a ValueError)
├── CaptureError      the model cannot be traced
│   └── GraphBreakError    it can be traced, but into several graphs only
├── ProfileError      an operator could not be measured
├── ProblemError      a planning problem is malformed (also a ValueError)
├── PlanError         a plan asks for something that its problem cannot do
│   └── PlanMismatchError  a plan does not fit model, shapes or versions
├── BudgetError       no known plan fits the budget
├── BackwardError     a backward pass asks for what a planned step cannot give
└── CodecError        a tensor cannot be encoded or decoded
"""

from __future__ import annotations


class FxHybridError(Exception):
    """Base of all errors raised by fxhybrid."""


class InvalidArgument(FxHybridError, ValueError):
    """A parameter's value cannot be used; the message names value, limit and way out."""


class CaptureError(FxHybridError):
    """The model cannot be traced into one joint graph; names the user's line where known."""


class GraphBreakError(CaptureError):
    """The model cannot be traced into one graph, since Python decides something by values: it takes several."""


class ProfileError(FxHybridError):
    """An operator of the graph could not be measured on this device."""


class ProblemError(FxHybridError, ValueError):
    """A planning problem is malformed: unknown references, cycles, negative or non-finite numbers."""


class PlanError(FxHybridError):
    """A plan asks for an action that its problem does not offer or that leaves a tensor unavailable."""


class PlanMismatchError(PlanError):
    """A plan was made for another graph, other shapes or another version."""


class CodecError(FxHybridError):
    """A tensor cannot be encoded or decoded by the codec asked for."""


class BackwardError(FxHybridError):
    """A backward pass asks for what a planned step cannot give: derivatives of its gradients."""


class BudgetError(FxHybridError):
    """No known plan fits the budget.

    Attributes:
        budget_bytes: the budget asked for.
        minimum_bytes: the smallest peak for which a plan exists.
        minimum_lower_bound_bytes: no plan that makes each tensor at most once more can go below this.
        holder: the operator at the peak of the smallest plan.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int,
        minimum_bytes: int,
        minimum_lower_bound_bytes: int,
        holder: str,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.minimum_lower_bound_bytes = minimum_lower_bound_bytes
        self.holder = holder


def let_go_of_frames(error: BaseException) -> None:
    """Lets go of the frames that an error and its causes went through: they hold their callers, with all variables."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += [each.__cause__, each.__context__]
