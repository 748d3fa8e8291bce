"""Recurrent layers as one opaque operator a layer.

AOTAutograd would unroll them into thousands of nodes that run up to three times slower than eager, and drop
the dropout between layers. So the calls in Dynamo's graph are replaced before it sees them: each layer
becomes ``fxhybrid::recurrent``, whose backward operator runs the layer again and differentiates it, with the
very kernels of eager. What crosses to the backward pass is the layer's input, not its time steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxhybrid.errors import CaptureError

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LAYERS: dict[Any, str] = {getattr(torch, kind): kind for kind in _KINDS}
_AUTOGRAD_KEYS = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)


def make_opaque(graph_module: fx.GraphModule) -> None:
    """Replaces the recurrent calls of Dynamo's graph, in place.

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
        node.target, node.args = run_layers, (kind, *node.args)
    if nodes:
        graph_module.recompile()


def run_layers(
    kind: str,
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
    """What ``torch.gru`` and its like give, one operator a layer and torch's own dropout between them."""
    states = [state] if isinstance(state, Tensor) else list(state)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    x = x.transpose(0, 1) if batch_first else x
    last: list[list[Tensor]] = []
    for layer in range(num_layers):
        mine = [s[layer * directions : (layer + 1) * directions] for s in states]
        theirs = list(weights[layer * per_layer : (layer + 1) * per_layer])
        x, *hidden = torch.ops.fxhybrid.recurrent(kind, x, mine, theirs, has_biases, bidirectional)
        last.append(hidden)
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


@torch.library.custom_op("fxhybrid::recurrent", mutates_args=())
def recurrent(
    kind: str, x: Tensor, states: list[Tensor], weights: list[Tensor], has_biases: bool, bidirectional: bool
) -> list[Tensor]:
    """One recurrent layer over (time, batch, features): the output, then the last states."""
    x, *others = (t.detach() for t in (x, *states, *weights))
    n = len(states)
    with torch.enable_grad():  # oneDNN rounds otherwise where gradients are switched off
        return [t.contiguous() for t in _layer(kind, x, others[:n], others[n:], has_biases, bidirectional)]


@recurrent.register_fake
def _(
    kind: str, x: Tensor, states: list[Tensor], weights: list[Tensor], has_biases: bool, bidirectional: bool
) -> list[Tensor]:
    width = states[0].shape[2] * (2 if bidirectional else 1)
    return [x.new_empty(x.shape[0], x.shape[1], width), *(s.new_empty(s.shape) for s in states)]


@torch.library.custom_op("fxhybrid::recurrent_backward", mutates_args=())
def recurrent_backward(
    kind: str,
    gradients: list[Tensor],
    outputs: list[int],
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    wanted: list[int],
) -> list[Tensor]:
    """Gradients of the ``wanted`` among (x, states, weights), given those of the ``outputs`` named."""
    with _differentiable():
        leaves = [t.detach() for t in (x, *states, *weights)]
        for i in wanted:
            leaves[i].requires_grad_()
        n = 1 + len(states)
        results = _layer(kind, leaves[0], leaves[1:n], leaves[n:], has_biases, bidirectional)
        asked = [leaves[i] for i in wanted]
        found = torch.autograd.grad([results[i] for i in outputs], asked, gradients, allow_unused=True)
    return [
        torch.zeros_like(leaf, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for g, leaf in zip(found, asked, strict=True)
    ]


@recurrent_backward.register_fake
def _(
    kind: str,
    gradients: list[Tensor],
    outputs: list[int],
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    wanted: list[int],
) -> list[Tensor]:
    leaves = (x, *states, *weights)
    return [leaves[i].new_empty(leaves[i].shape) for i in wanted]


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Records gradients within an operator, where the dispatcher has switched autograd off."""
    with contextlib.ExitStack() as stack:
        for key in _AUTOGRAD_KEYS:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    kind, x, states, weights, has_biases, bidirectional = inputs
    leaves = (x, *states, *weights)
    ctx.save_for_backward(*leaves)
    ctx.n_states, ctx.options = len(states), (kind, has_biases, bidirectional)
    ctx.wanted = [i for i, t in enumerate(leaves) if t.requires_grad]


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    kind, has_biases, bidirectional = ctx.options
    leaves = list(ctx.saved_tensors)
    n = 1 + ctx.n_states
    present = [(i, g) for i, g in enumerate(gradients) if g is not None]
    found = torch.ops.fxhybrid.recurrent_backward(
        kind,
        [g for _, g in present],
        [i for i, _ in present],
        leaves[0],
        leaves[1:n],
        leaves[n:],
        has_biases,
        bidirectional,
        ctx.wanted,
    )
    full: list[Tensor | None] = [None] * len(leaves)
    for i, gradient in zip(ctx.wanted, found, strict=True):
        full[i] = gradient
    return None, full[0], full[1:n], full[n:], None, None


recurrent.register_autograd(_differentiate, setup_context=_keep)
