"""``bernoulli_`` as a function: random numbers in the order in which the tensor lies in memory.

ATen's own function draws into a contiguous result: a transposed tensor (an in-place or alpha dropout of one) would get
other numbers from the same generator than the method gives it. Traces have ATen's function for both, so calls of the
function are told apart in Dynamo's graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("bernoulli(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def bernoulli(x: Tensor, p: float) -> Tensor:
    """Returns ones with probability ``p``, else zeros; shape, strides and type as ``x``."""
    return torch.empty_like(x).bernoulli_(p)


def _fake(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("bernoulli", bernoulli, "CompositeExplicitAutograd")
torch.library.register_fake("fxhybrid::bernoulli", _fake, lib=_LIBRARY)


def in_memory_order(x: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Any:
    """Stands in for ``aten.bernoulli.p`` in a trace."""
    if generator is not None:
        return NotImplemented
    return torch.ops.fxhybrid.bernoulli.default(x, p)


DECOMPOSITIONS = {torch.ops.aten.bernoulli.p: in_memory_order}


def mark_contiguous_bernoulli(graph_module: fx.GraphModule) -> None:
    """Replaces calls of ``torch.bernoulli(x, p)`` in Dynamo's graph, in place, by draws into a contiguous tensor."""
    called = [n for n in graph_module.graph.nodes if n.target in (torch.bernoulli, "bernoulli")]
    found = [n for n in called if (len(n.args) > 1 or "p" in n.kwargs) and n.kwargs.get("generator") is None]
    for node in found:
        node.op, node.target = "call_function", contiguous_bernoulli
    if found:
        graph_module.recompile()


def contiguous_bernoulli(x: Tensor, p: float, *, generator: None = None) -> Tensor:
    """Returns what ``torch.bernoulli(x, p)`` gives."""
    return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(p)
