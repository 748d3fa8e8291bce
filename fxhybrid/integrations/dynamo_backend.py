"""``torch.compile(model, backend="fxhybrid", options={"budget": ...})``.

A module is planned as a whole, however many graphs it takes (``compiled_module``). Of a function, and of a module with
``fullgraph=True`` or in a wrapper, Dynamo hands over graphs that take parameters and buffers as arguments. Each becomes
a module that owns them again, and is compiled like any other at its first call, beside what others have pending.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxhybrid.api import compile
from fxhybrid.errors import InvalidArgument
from fxhybrid.integrations.compiled_module import plan_whole_modules
from fxhybrid.options import OPTIONS, check_names
from fxhybrid.segments.lifted_graph import LiftedGraph
from fxhybrid.torch_internals import ShortenTraceback

# A loss is part of Dynamo's graph already, or outside of it; so are sizes, and its arguments have no names.
ACCEPTED = (*(name for name in OPTIONS if name not in ("loss_fn", "return_outputs", "dynamic")), "plan")


class BackendArgument(ShortenTraceback, InvalidArgument):
    """An argument of ``torch.compile`` that cannot be used; Dynamo hands its own kind of error on as it is."""

    def __init__(self, message: str) -> None:
        """Takes what to say."""
        super().__init__(message, first_useful_frame=None)


def checked_options(options: Mapping[str, Any] | None, mode: str | None) -> dict[str, Any]:
    """Returns the options of ``torch.compile`` as arguments of ``fxhybrid.compile``.

    Raises:
        InvalidArgument: no budget, a mode, or an option that there is not.
    """
    if mode is not None:
        raise BackendArgument(f"mode is {mode!r}, a setting of Inductor's; leave it out with backend='fxhybrid'")
    chosen = dict(options or {})
    if "budget" not in chosen:
        raise BackendArgument('torch.compile(..., backend="fxhybrid") needs options={"budget": "512MiB"}')
    try:
        check_names(chosen, ACCEPTED)
    except InvalidArgument as error:
        raise BackendArgument(str(error)) from None
    return chosen


def fxhybrid_backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],  # noqa: ARG001  Dynamo's protocol for backends
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Makes Dynamo's graph train within a budget; ``options`` are ``fxhybrid.compile``'s, ``budget`` among them.

    Raises:
        InvalidArgument: no budget, a mode, or an option that there is not.
    """
    chosen = checked_options(options, mode)
    lifted: list[tuple[LiftedGraph, nn.Module]] = []

    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return graph(*arguments)
        if not lifted or not lifted[0][0].owns(arguments):
            module = LiftedGraph(graph, arguments)
            lifted[:] = [(module, compile(module, **chosen))]
        module, hybrid = lifted[0]
        return hybrid(*module.free_of(arguments))

    return run


def _options_of(backend: Any) -> dict[str, Any] | None:
    """Returns what a module is to be planned with, if ``torch.compile`` was called with this backend."""
    if getattr(backend, "compiler_fn", backend) is not fxhybrid_backend:
        return None
    given = getattr(backend, "kwargs", {})
    return checked_options(given.get("options"), given.get("mode"))


plan_whole_modules(_options_of)
