"""Captures one of several graphs that Dynamo makes of a model: while Dynamo hands it over, whose guards choose it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxhybrid.capture.capture import Capture, FlatFunction, differentiated
from fxhybrid.capture.random_numbers import random_inputs, with_traced_types
from fxhybrid.capture.refusals import differentiated_error
from fxhybrid.errors import FxHybridError
from fxhybrid.torch_internals import TracingContext, convert_frame


def capture_segment(
    module: nn.Module,
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    flat_inputs: Callable[..., Sequence[Any]],
    *,
    exact: bool,
) -> Capture:
    """Captures a graph of Dynamo's and its backward pass.

    Args:
        module: owns the graph's parameters and buffers.
        graph: Dynamo's; it stays as it is.
        example_inputs: what Dynamo hands over with it.
        flat_inputs: gives the graph's inputs for the arguments of a call.
        exact: whether gradients must have eager's very bits.

    Raises:
        CaptureError: the graph does something that a joint graph cannot carry.
    """
    context: Any = TracingContext.get()
    copied = _copied(graph)
    given = convert_frame.BackendInput("", copied, list(example_inputs), context.fake_mode, context.tensor_to_context)
    try:
        random_positions = random_inputs(copied)
        joint, metadata, names = differentiated(module, given, exact=exact)
    except FxHybridError:
        raise
    except Exception as error:  # AOTAutograd passes on whatever the model's operators raise
        raise differentiated_error(error) from error

    def bind(flat: FlatFunction) -> Callable[..., Any]:
        typed = with_traced_types(flat, random_positions)
        return lambda *call: typed(*flat_inputs(*call))

    return Capture(joint, metadata, lambda *_: True, bind, names, 0)


def needs_gradient(graph: fx.GraphModule) -> bool:
    """Says whether an output of Dynamo's graph needs a gradient: else there is nothing to plan."""
    outputs = graph.graph.output_node().all_input_nodes
    values = (node.meta.get("example_value") for node in outputs)
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    twin = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    twin.output(twin.graph_copy(graph.graph, twins))
    for node, copied in twins.items():
        copied.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    return fx.GraphModule(graph, twin)
