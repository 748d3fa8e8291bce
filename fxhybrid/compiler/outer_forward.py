"""Gives a compiled class the model's ``forward`` by name and signature, around which trainers may set another one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from fxhybrid.capture.outer_context import refuse_export


class Compiled(Protocol):
    """Is a compiled module.

    Attributes:
        _fxhybrid_outer: the forward that was set on it; None if there is none.
        _fxhybrid_call: runs the planned step, or the model.
    """

    _fxhybrid_outer: Callable[..., Any] | None
    _fxhybrid_call: Callable[..., Any]


class OuterForward:
    """Is the attribute ``forward`` of a compiled class.

    Trainers wrap it: ``model.forward = autocast(model.forward)``. What they set stays apart from the model's own
    attributes, since the planned graphs would run it a second time.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        """Takes the forward of the model's class."""

        def forward(self: Compiled, *args: Any, **kwargs: Any) -> Any:
            refuse_export()
            return self._fxhybrid_call(*args, **kwargs)

        functools.update_wrapper(forward, original)
        del forward.__dict__["__wrapped__"]  # who unwraps must not arrive at the plain model
        forward.__dict__["__signature__"] = inspect.signature(original)
        self.function = forward

    def __get__(self, instance: Compiled | None, owner: type | None = None) -> Callable[..., Any]:
        if instance is None:
            return self.function
        return instance._fxhybrid_outer or MethodType(self.function, instance)

    def __set__(self, instance: Compiled, value: Callable[..., Any]) -> None:
        object.__setattr__(instance, "_fxhybrid_outer", value)

    def __delete__(self, instance: Compiled) -> None:
        object.__setattr__(instance, "_fxhybrid_outer", None)
