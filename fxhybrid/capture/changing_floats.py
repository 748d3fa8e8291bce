"""Python floats that change from call to call, such as temperatures and mixing weights, as inputs of the graph.

The first capture takes every float as a constant. A guard that fails for a float's value shows that it changes: the
next capture of that model gets it as a tensor without dimensions, so that a new value costs no planning. Where an
operator takes no tensor in its place (a dropout rate), it stays a constant, and each value has a plan of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxhybrid.torch_internals import (
    FrameStateSizeEntry,
    TensorifyState,
    auto_dynamic,
    builder,
    tensorify_python_scalars,
)

aten = torch.ops.aten
FLOAT_GUARD = re.compile(r"(?P<source>\S.*?) == -?(\d+\.\d*(e[+-]?\d+)?|\d+e[+-]?\d+)\s*(#|$)")
FLOAT_BYTES = 8  # of a float64 tensor without dimensions

_BUILDER: Any = builder
torchs_own = _BUILDER.process_automatic_dynamic


@dataclass
class ChangingFloats:
    """Holds, by Dynamo's names for their sources, the floats of a step that have changed.

    Attributes:
        inputs: those that become inputs of the graph.
        constants: those that no graph can have as an input.
    """

    inputs: set[str] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)

    def note(self, guards: Any, call: Mapping[str, Any]) -> None:
        """Looks whether a guard fails for this call because a float has another value."""
        for text in guards.check_verbose(call).verbose_code_parts:
            found = FLOAT_GUARD.match(text)
            if found and found["source"] not in self.constants:
                self.inputs.add(found["source"])

    def make_constant(self) -> None:
        """Gives up on having them as inputs."""
        self.constants |= self.inputs
        self.inputs.clear()


_KNOWN: WeakKeyDictionary[nn.Module, ChangingFloats] = WeakKeyDictionary()


def changing_floats(module: nn.Module) -> ChangingFloats:
    """Returns what is known of a module's floats."""
    return _KNOWN.setdefault(module, ChangingFloats())


@contextlib.contextmanager
def floats_as_inputs(names: set[str]) -> Iterator[None]:
    """Lets Dynamo make these floats inputs of the graph."""

    def process(tx: Any, name: str, entry: Any, **options: Any) -> Any:
        return FrameStateSizeEntry(scalar=auto_dynamic) if name in names else torchs_own(tx, name, entry, **options)

    _BUILDER.process_automatic_dynamic = process
    try:
        yield
    finally:
        _BUILDER.process_automatic_dynamic = torchs_own


def compute_floats_as_tensors(module: fx.GraphModule, fake_mode: Any) -> None:
    """Replaces arithmetic with Python floats in AOTAutograd's graph, in place, by arithmetic with tensors.

    Raises:
        TensorifyScalarRestartAnalysis: an operator takes no tensor in a float's place.
    """
    try:
        tensorify_python_scalars(module, fake_mode.shape_env, fake_mode)
    finally:
        TensorifyState.clear()
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default):
        source, dtype = node.args
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
    module.recompile()


def has_floats(module: fx.GraphModule) -> bool:
    """Says whether a graph computes with Python floats of tensors."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    return any(isinstance(leaf, torch.SymFloat) for value in values for leaf in pytree.tree_leaves(value))
