"""Random numbers of Python's ``random`` that a model draws in forward: inputs of the graph, drawn at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from fxhybrid.errors import CaptureError
from fxhybrid.torch_internals import RandomValueSource, RandomVariable

RANDOM = (
    "draw the random number before the call and pass it in, model(x, weight), or set it as an attribute; or draw it "
    "with torch: torch.rand(()) in place of random.random(), torch.randperm(n) in place of shuffling"
)


def is_random_input(node: fx.Node) -> bool:
    """Says whether a node of Dynamo's graph is a number of Python's ``random``."""
    return isinstance(getattr(node, "_dynamo_source", None), RandomValueSource)


def random_inputs(module: fx.GraphModule) -> tuple[int, ...]:
    """Finds the inputs of Dynamo's graph that are random numbers.

    Raises:
        CaptureError: a graph in float64 has one: Dynamo traces it as float32.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    found = [i for i, node in enumerate(placeholders) if is_random_input(node)]
    dtypes = {getattr(node.meta.get("example_value"), "dtype", None) for node in placeholders}
    if found and torch.float64 in dtypes:
        raise CaptureError(
            f"the model computes in float64, and draws a number with Python's random module in forward; {RANDOM}"
        )
    return tuple(found)


def with_traced_types(flat: Callable[..., Sequence[Any]], positions: Sequence[int]) -> Callable[..., Sequence[Any]]:
    """Returns a function over flat inputs that takes its random numbers in the type that they were traced with.

    Dynamo passes them in float64, which would decide the type of arithmetic with tensors without dimensions.
    """
    if not positions:
        return flat

    def run(*inputs: Any) -> Sequence[Any]:
        return flat(*(x.float() if i in positions else x for i, x in enumerate(inputs)))

    return run


class _Unsupported:
    """Says of the generators that Dynamo meets that it cannot follow them; of those that it makes that it can."""

    def __init__(self, own: Callable[[Any], bool]) -> None:
        self._own = own

    def __get__(self, variable: Any, owner: Any) -> Callable[[Any], bool]:
        return self._own if variable is not None else lambda _: False


@contextlib.contextmanager
def untraced_generators() -> Iterator[None]:
    """Lets a trace end where the model draws from a generator of its own, or shuffles by the common one.

    Dynamo would follow them with a copy: what is drawn while tracing would be drawn at each call. torch 2.14 does so
    for ``random.sample``, ``shuffle`` and ``seed``.
    """
    name = "is_supported_random_obj"
    with patch.object(RandomVariable, name, _Unsupported(getattr(RandomVariable, name))):
        yield
