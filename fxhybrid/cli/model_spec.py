"""Model specs, as the command line takes them: a suite model, or ``package.module:factory``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxhybrid import suite
from fxhybrid.errors import InvalidArgument
from fxhybrid.optional_imports import load_function

_RETURNS = "(model, inputs), (model, inputs, loss_fn) or (model, inputs, loss_fn, loss_args)"


@dataclass(frozen=True)
class ModelSpec:
    """Holds a model with what is needed to plan it.

    Attributes:
        model: in training mode.
        inputs: positional (tuple) or keyword (dict) arguments of the model.
        loss_fn: ``loss_fn(output, *loss_args)``, or None.
        loss_args: example arguments of ``loss_fn``.
    """

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss_fn: Callable[..., Any] | None
    loss_args: tuple[Any, ...]


def load_model_spec(text: str, size: suite.Size = "full") -> ModelSpec:
    """Loads the model that ``text`` names.

    Args:
        text: a name of ``fxhybrid.suite``, or ``package.module:factory``; the current folder is searched too.
        size: of a suite model.

    Raises:
        InvalidArgument: there is no such model, or the factory returns something else than it should.
    """
    if ":" not in text:
        if text not in suite.names():
            raise InvalidArgument(
                f"no model {text!r}: give package.module:factory, or one of the suite: {', '.join(suite.names())}"
            )
        return suite_spec(suite.load(text, size))
    return _made_spec(text, load_function(text)())


def suite_spec(case: suite.SuiteCase) -> ModelSpec:
    """Makes a spec of a suite case; its inputs become a dict where it has keyword arguments."""
    inputs: tuple[Any, ...] | dict[str, Any] = case.inputs
    if case.kwargs:
        inputs = dict(inspect.signature(case.model.forward).bind(*case.inputs, **case.kwargs).arguments)
    return ModelSpec(case.model, inputs, case.loss_fn, case.loss_args)


def _made_spec(text: str, made: Any) -> ModelSpec:
    parts = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    if not 2 <= len(parts) <= 4 or not isinstance(parts[0], nn.Module):
        raise InvalidArgument(f"{text} must return {_RETURNS}; it returned a {type(made).__name__}")
    model, inputs, *loss = parts
    if not isinstance(inputs, (tuple, list, dict)):
        raise InvalidArgument(f"{text} must return {_RETURNS}, where inputs is a tuple or a dict")
    loss_args = loss[1] if len(loss) > 1 else ()
    loss_args = tuple(loss_args) if isinstance(loss_args, (tuple, list)) else (loss_args,)
    arguments = inputs if isinstance(inputs, dict) else tuple(inputs)
    return ModelSpec(model, arguments, loss[0] if loss else None, loss_args)
