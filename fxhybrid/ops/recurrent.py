"""Recurrent layers as one opaque operator a layer.

AOTAutograd would unroll them into thousands of nodes that run up to three times slower than eager, and drop
the dropout between layers. So the calls in Dynamo's graph are replaced before it sees them: each layer
becomes ``fxhybrid::recurrent``, whose backward operator runs the layer again and differentiates it, with the
very kernels of eager. What crosses to the backward pass is the layer's input, not its time steps.

In segments, backward has the time steps of one segment at a time: forward notes the states before each segment, and
backward runs and differentiates segment by segment, the last one first. That takes no longer and a fraction of the
memory, but sums weight gradients in another order, so it is not for plans that promise eager's very bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxhybrid.errors import CaptureError
from fxhybrid.torch_internals import DispatchKey, ExcludeDispatchKey

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LAYERS: dict[Any, str] = {getattr(torch, kind): kind for kind in _KINDS}
SEGMENT_STEPS = 16  # time steps; shorter segments take longer
_AUTOGRAD_KEYS = (DispatchKey.AutogradFunctionality, DispatchKey.ADInplaceOrView)


def make_opaque(graph_module: fx.GraphModule, *, in_segments: bool) -> None:
    """Replaces the recurrent calls of Dynamo's graph, in place.

    Args:
        graph_module: Dynamo's.
        in_segments: whether weight gradients may be summed in another order than eager's, which saves memory.

    Raises:
        CaptureError: a packed sequence, or autocast.
    """
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in _LAYERS]
    for node in nodes:
        kind = _LAYERS[node.target]
        if not isinstance(node.args[2], (list, tuple)):
            raise CaptureError(f"{kind} of a packed sequence cannot be planned; pass a padded tensor instead")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CaptureError(
                f"{kind} under autocast cannot be planned; leave the layer out of it: "
                "with torch.autocast(device, enabled=False)"
            )
        node.target, node.args = run_layers, (kind, SEGMENT_STEPS if in_segments else 0, *node.args)
    if nodes:
        graph_module.recompile()


def run_layers(
    kind: str,
    segment_steps: int,
    x: Tensor,
    state: Tensor | tuple[Tensor, ...],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Returns what ``torch.gru`` and its like give, one operator a layer and torch's own dropout between them."""
    states = [state] if isinstance(state, Tensor) else list(state)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    x = x.transpose(0, 1) if batch_first else x
    last: list[list[Tensor]] = []
    for layer in range(num_layers):
        mine = [s[layer * directions : (layer + 1) * directions] for s in states]
        theirs = list(weights[layer * per_layer : (layer + 1) * per_layer])
        trained = [i for i, t in enumerate((x, *mine, *theirs)) if t.requires_grad]
        x, *hidden = torch.ops.fxhybrid.recurrent(
            kind, x, mine, theirs, has_biases, bidirectional, segment_steps, trained
        )
        last.append(hidden[: len(states)])
        if train and dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, True)
    x = x.transpose(0, 1) if batch_first else x
    if num_layers == 1:
        return (x, *last[0])
    return (x, *(torch.cat(parts) for parts in zip(*last, strict=True)))


def _layer(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
) -> list[Tensor]:
    state = tuple(states) if kind == "lstm" else states[0]
    run = getattr(torch, kind)
    return list(run(x, state, list(weights), has_biases, 1, 0.0, True, bidirectional, False))


def runs_in_segments(graph: fx.Graph) -> bool:
    """Tells whether a recurrent layer sums weight gradients segment by segment, in another order than eager's."""
    layers = graph.find_nodes(op="call_function", target=torch.ops.fxhybrid.recurrent.default)
    return any(len(_segments(n.args[1].meta["val"], n.args[6], n.args[5])) > 1 for n in layers)


def _segments(x: Tensor, segment_steps: int, bidirectional: bool) -> list[slice]:
    """Returns the time steps of each segment; both directions at once need all of them."""
    length = x.shape[0] if bidirectional or segment_steps == 0 else segment_steps
    return [slice(begin, begin + length) for begin in range(0, x.shape[0], length)]


@torch.library.custom_op("fxhybrid::recurrent", mutates_args=())
def recurrent(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    segment_steps: int,
    trained: list[int],
) -> list[Tensor]:
    """Runs one recurrent layer over (time, batch, features).

    Returns the output, the last states, and each state before all segments but the first.
    """
    x, *others = leaves = [t.detach() for t in (x, *states, *weights)]
    for i in trained:
        leaves[i].requires_grad_()
    n = len(states)
    before, weights = others[:n], others[n:]
    segments = _segments(x, segment_steps, bidirectional)
    out = x.new_empty(_output_shape(x, states, bidirectional))
    marks = [s.new_empty(len(segments) - 1, *s.shape) for s in states]
    # Matrix products take other paths, which round otherwise, where nothing needs a gradient.
    with differentiable(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, _never):
        for i, segment in enumerate(segments):
            for mark, state in zip(marks, before, strict=True):
                if i:
                    mark[i - 1].copy_(state)
            part, *before = _layer(kind, x[segment], before, weights, has_biases, bidirectional)
            before = [state.detach() for state in before]
            out[segment].copy_(part.detach())
            del part  # or it would live as long as the next one
    return [out, *(s.clone(memory_format=torch.contiguous_format) for s in before), *marks]


def _never(_: Any) -> Tensor:
    """Stands for tensors saved in the forward operator, whose gradients are never taken."""
    raise AssertionError


def _output_shape(x: Tensor, states: Sequence[Tensor], bidirectional: bool) -> tuple[int, ...]:
    return x.shape[0], x.shape[1], states[0].shape[2] * (2 if bidirectional else 1)


@recurrent.register_fake
def _(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    segment_steps: int,
    trained: list[int],
) -> list[Tensor]:
    n_marks = len(_segments(x, segment_steps, bidirectional)) - 1
    marks = (s.new_empty(n_marks, *s.shape) for s in states)
    return [x.new_empty(_output_shape(x, states, bidirectional)), *(s.new_empty(s.shape) for s in states), *marks]


@torch.library.custom_op("fxhybrid::recurrent_backward", mutates_args=())
def recurrent_backward(
    kind: str,
    gradients: list[Tensor],
    outputs: list[int],
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    marks: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    segment_steps: int,
    wanted: list[int],
) -> list[Tensor]:
    """Computes the gradients of the ``wanted`` among (x, states, weights), given those of the ``outputs`` named."""
    leaves = [t.detach() for t in (x, *states, *weights)]
    n = 1 + len(states)
    given = dict(zip(outputs, gradients, strict=True))
    found: dict[int, Tensor] = {}
    segments = _segments(x, segment_steps, bidirectional)
    if len(segments) > 1 and 0 in wanted:
        found[0] = torch.empty_like(x, memory_format=torch.contiguous_format)
    for i in range(len(segments) - 1, -1, -1):
        before = [mark[i - 1] for mark in marks] if i else leaves[1:n]
        own = [leaves[0][segments[i]], *before, *leaves[n:]]
        asked = sorted({*wanted, *range(1, n)}) if i else wanted
        theirs = {k: g if k else g[segments[i]] for k, g in given.items()}
        part = _segment_gradients(kind, own, n, theirs, asked, has_biases, bidirectional)
        if i:  # what the states before this segment get is for the one that made them
            given = {k: g for k, g in given.items() if k == 0} | {k: part.pop(k) for k in range(1, n) if k in part}
        for k, g in part.items():
            if len(segments) == 1:
                found[k] = g.contiguous()
            elif k == 0:
                found[0][segments[i]].copy_(g)
            else:
                found[k] = found[k].add_(g) if k in found else g.clone(memory_format=torch.contiguous_format)
    for k in wanted:
        if k not in found:
            found[k] = torch.zeros_like(leaves[k], memory_format=torch.contiguous_format)
    return [found[k] for k in wanted]


def _segment_gradients(
    kind: str,
    leaves: list[Tensor],
    n: int,
    given: dict[int, Tensor],
    asked: list[int],
    has_biases: bool,
    bidirectional: bool,
) -> dict[int, Tensor]:
    """Runs a layer over a segment and differentiates it; ``leaves`` are its input, ``n - 1`` states and weights."""
    with differentiable():
        own = [t.detach() for t in leaves]
        for i in asked:
            own[i].requires_grad_()
        results = _layer(kind, own[0], own[1:n], own[n:], has_biases, bidirectional)
        results, gradients = [results[i] for i in given], list(given.values())
        found = torch.autograd.grad(results, [own[i] for i in asked], gradients, allow_unused=True)
    return {i: g for i, g in zip(asked, found, strict=True) if g is not None}


@recurrent_backward.register_fake
def _(
    kind: str,
    gradients: list[Tensor],
    outputs: list[int],
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    marks: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    segment_steps: int,
    wanted: list[int],
) -> list[Tensor]:
    leaves = (x, *states, *weights)
    return [leaves[i].new_empty(leaves[i].shape) for i in wanted]


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Records gradients within an operator, where the dispatcher has switched autograd off."""
    with contextlib.ExitStack() as stack:
        for key in _AUTOGRAD_KEYS:
            stack.enter_context(ExcludeDispatchKey(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Saves what :func:`backward` needs."""
    kind, x, states, weights, *options, ctx.wanted = inputs
    leaves = (x, *states, *weights)
    ctx.save_for_backward(*leaves, *output[1 + len(states) :])
    ctx.n_states, ctx.n_leaves, ctx.kind, ctx.options = len(states), len(leaves), kind, options


def backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    """Differentiates :func:`recurrent`."""
    leaves, marks = list(ctx.saved_tensors[: ctx.n_leaves]), list(ctx.saved_tensors[ctx.n_leaves :])
    n = 1 + ctx.n_states
    present = [(i, g) for i, g in enumerate(gradients[:n]) if g is not None]
    found = torch.ops.fxhybrid.recurrent_backward(
        ctx.kind,
        [g for _, g in present],
        [i for i, _ in present],
        leaves[0],
        leaves[1:n],
        leaves[n:],
        marks,
        *ctx.options,
        ctx.wanted,
    )
    full: list[Tensor | None] = [None] * len(leaves)
    for i, gradient in zip(ctx.wanted, found, strict=True):
        full[i] = gradient
    return None, full[0], full[1:n], full[n:], None, None, None, None


recurrent.register_autograd(backward, setup_context=setup_context)
