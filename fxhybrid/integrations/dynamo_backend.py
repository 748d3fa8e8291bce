"""``torch.compile(model, backend="fxhybrid", options={"budget": ...})``.

Dynamo hands over a graph that takes parameters and buffers as arguments. It becomes a module that owns them
again, and that module is compiled like any other at the first call: the same capture, plans and promise. The
graphs of one step keep the budget together; pass ``fullgraph=True`` to have one graph, which is planned as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxhybrid.api import compile
from fxhybrid.errors import InvalidArgument
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
    if mode is not None:
        raise BackendArgument(f"mode is {mode!r}, a setting of Inductor's; leave it out with backend='fxhybrid'")
    chosen = dict(options or {})
    if "budget" not in chosen:
        raise BackendArgument('torch.compile(..., backend="fxhybrid") needs options={"budget": "512MiB"}')
    try:
        check_names(chosen, ACCEPTED)
    except InvalidArgument as error:
        raise BackendArgument(str(error)) from None
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
