"""A step of a gated recurrent unit as one opaque operator.

Eager computes its gates in place, in slices of one matrix; a trace computes them in tensors of their own, for which
vectorized kernels round in another way. The backward operator here runs the step again and differentiates it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxhybrid.ops.graph_calls import replace_calls
from fxhybrid.ops.recurrent import differentiable


def make_gru_cells_opaque(graph_module: fx.GraphModule) -> None:
    """Replaces calls of ``torch.gru_cell`` in Dynamo's graph, in place."""
    replace_calls(graph_module, (torch.gru_cell,), run_gru_cell)


def run_gru_cell(
    x: Tensor,
    state: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """Returns what ``torch.gru_cell`` gives."""
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    result: Tensor = torch.ops.fxhybrid.gru_cell([x, state, *weights])
    return result


@torch.library.custom_op("fxhybrid::gru_cell", mutates_args=())
def gru_cell(leaves: list[Tensor]) -> Tensor:
    """Computes the next state from input, state, weights and biases."""
    return torch.gru_cell(*leaves)


@gru_cell.register_fake
def _(leaves: list[Tensor]) -> Tensor:
    return torch.empty_like(leaves[1], memory_format=torch.contiguous_format)


@torch.library.custom_op("fxhybrid::gru_cell_backward", mutates_args=())
def gru_cell_backward(gradient: Tensor, leaves: list[Tensor], wanted: list[int]) -> list[Tensor]:
    """Computes the gradients of the ``wanted`` among the leaves."""
    with differentiable():
        own = [t.detach() for t in leaves]
        for i in wanted:
            own[i].requires_grad_()
        found = torch.autograd.grad(torch.gru_cell(*own), [own[i] for i in wanted], gradient)
    return [g.contiguous() for g in found]


@gru_cell_backward.register_fake
def _(gradient: Tensor, leaves: list[Tensor], wanted: list[int]) -> list[Tensor]:
    return [torch.empty_like(leaves[i], memory_format=torch.contiguous_format) for i in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (leaves,) = inputs
    ctx.wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
    ctx.save_for_backward(*leaves)


def _backward(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    leaves = list(ctx.saved_tensors)
    found = torch.ops.fxhybrid.gru_cell_backward(gradient, leaves, ctx.wanted)
    full: list[Tensor | None] = [None] * len(leaves)
    for i, value in zip(ctx.wanted, found, strict=True):
        full[i] = value
    return full


gru_cell.register_autograd(_backward, setup_context=_setup_context)
