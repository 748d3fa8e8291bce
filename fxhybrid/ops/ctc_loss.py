"""The CTC loss as one opaque operator.

Its forward pass makes a table whose size depends on the longest target, which no graph can hold. So the calls in
Dynamo's graph are replaced before AOTAutograd sees them: the operator keeps its table to itself, and its backward
operator makes the table again, with the very kernels of eager.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxhybrid.ops.graph_calls import replace_calls

aten = torch.ops.aten
NO_REDUCTION, MEAN, SUM = range(3)
_CODES = {"none": NO_REDUCTION, "mean": MEAN, "sum": SUM}


def fake_table(fake_mode: Any, _op: Any, log_probs: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Computes the results of ``_ctc_loss`` as if all targets were of full length, so that it can be traced at all."""
    with fake_mode:
        steps, batch = log_probs.shape[:2]
        return log_probs.new_empty(batch), log_probs.new_empty(batch, steps, 2 * targets.shape[-1] + 1)


FAKES = {aten._ctc_loss.default: fake_table, aten._ctc_loss.Tensor: fake_table}


def make_ctc_loss_opaque(graph_module: fx.GraphModule) -> None:
    """Replaces the calls of the CTC loss in Dynamo's graph, in place."""
    replace_calls(graph_module, (F.ctc_loss, torch.ctc_loss), run_ctc_loss)


def run_ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Returns what ``torch.nn.functional.ctc_loss`` gives."""
    code = _CODES[reduction] if isinstance(reduction, str) else reduction
    batched = log_probs.dim() == 3
    lengths = [torch.as_tensor(given).reshape(-1) for given in (input_lengths, target_lengths)]
    losses: Tensor = torch.ops.fxhybrid.ctc_loss(
        log_probs if batched else log_probs.unsqueeze(1), targets, *lengths, blank, zero_infinity
    )
    if zero_infinity:
        losses = torch.where(losses == torch.inf, losses.new_zeros(()), losses)
    if code == MEAN:
        return (losses / lengths[1].to(losses).clamp_min(1)).mean()
    if code == SUM:
        return losses.sum()
    return losses if batched else losses.squeeze(0)


@torch.library.custom_op("fxhybrid::ctc_loss", mutates_args=())
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """Computes the loss of each sequence; ``log_probs`` is (time, batch, classes)."""
    losses: Tensor = _with_table(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
    return losses


@ctc_loss.register_fake
def _(log_probs: Tensor, *_: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape[1])


@torch.library.custom_op("fxhybrid::ctc_loss_backward", mutates_args=())
def ctc_loss_backward(
    gradient: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """Computes the gradient of ``log_probs``, given those of all losses."""
    losses, table, *inputs = _with_table(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    result: Tensor = aten._ctc_loss_backward.default(
        gradient, log_probs, *inputs, losses, table, blank, zero_infinity
    ).contiguous()
    return result


@ctc_loss_backward.register_fake
def _(_gradient: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _with_table(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> tuple[Any, ...]:
    """Returns losses, table, and the inputs behind ``log_probs`` as the kernels take them."""
    inputs = (targets.to(log_probs.device, torch.long), input_lengths.tolist(), target_lengths.tolist())
    return (*aten._ctc_loss.default(log_probs, *inputs, blank, zero_infinity), *inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.blank, ctx.zero_infinity = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.fxhybrid.ctc_loss_backward(gradient, *ctx.saved_tensors, ctx.blank, ctx.zero_infinity)
    return (found, None, None, None, None, None)


ctc_loss.register_autograd(_backward, setup_context=_setup_context)
