"""Cross entropy some rows at a time, so that nothing as large as the logits exists beside them.

ATen keeps log probabilities, then makes a gradient of them and one of the logits: three times the logits, which hold
the peak of a language model with a large vocabulary. Rows are independent. So both passes take a few at a time and work
out their log probabilities on the way; the results are the very same bits. Where the gradient of the logits goes into
products with the output layer alone, those are taken from it some rows at a time, too, and it never exists as a whole;
the weight's gradient is then summed in another order than ATen's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SLICE_BYTES = 1 << 20  # of log probabilities: they stay in the nearer cache
MOST_SLICES, FEWEST_ROWS = 16, 64  # of products: weights are read, and their gradient is written, for each
NONE, MEAN = 0, 1  # reductions, as ATen numbers them
IGNORED = -100
_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_COMMON = "Tensor logits, Tensor target, int reduction, int ignore_index"
for _schema in (
    f"sliced_nll({_COMMON}) -> (Tensor, Tensor)",
    f"sliced_nll_backward(Tensor gradient, {_COMMON}, Tensor total_weight) -> Tensor",
    f"sliced_nll_products(Tensor gradient, {_COMMON}, Tensor total_weight, Tensor weight, Tensor hidden,"
    " bool bias) -> (Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
aten = torch.ops.aten


def sliced_nll(logits: Tensor, target: Tensor, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Computes ``nll_loss_forward`` of the log probabilities of ``logits``, (rows, classes), without class weights."""
    chosen = logits.new_empty((logits.shape[0], 1))
    ignored = target == ignore_index
    first = torch.where(ignored, 0, target).unsqueeze(1)
    for rows in _few_rows(logits):
        torch.gather(torch.log_softmax(logits[rows], 1), 1, first[rows], out=chosen[rows])
    only = torch.where(ignored, IGNORED, 0)  # the one class that is left, or none
    return aten.nll_loss_forward.default(chosen, only, None, reduction, IGNORED)  # type: ignore[no-any-return]


def sliced_nll_backward(
    gradient: Tensor, logits: Tensor, target: Tensor, reduction: int, ignore_index: int, total_weight: Tensor
) -> Tensor:
    """Computes the gradient of ``logits``."""
    result = torch.empty_like(logits)
    for rows in _few_rows(logits):
        logarithms = torch.log_softmax(logits[rows], 1)
        own = gradient[rows] if reduction == NONE else gradient
        of_logarithms = aten.nll_loss_backward.default(
            own, logarithms, target[rows], None, reduction, ignore_index, total_weight
        )
        aten._log_softmax_backward_data.out(of_logarithms, logarithms, 1, logits.dtype, out=result[rows])
    return result


def sliced_nll_products(
    gradient: Tensor,
    logits: Tensor,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
    weight: Tensor,
    hidden: Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of an output layer from that of the loss.

    With G the gradient of the logits, they are G @ weight, (rows, width), G.T @ hidden, (classes, width), and G summed
    over the rows, (1, classes), nothing without ``bias``. Row i of G is scale[i] * (softmax(logits[i]) -
    onehot(target[i])).
    """
    ignored = target == ignore_index
    scale = (gradient if reduction != MEAN else gradient / total_weight).expand(target.shape)
    scale = torch.where(ignored, 0.0, scale).to(logits.dtype).unsqueeze(1)
    first = torch.where(ignored, 0, target).unsqueeze(1)
    of_hidden = logits.new_empty((logits.shape[0], weight.shape[1]))
    of_weight = logits.new_zeros((logits.shape[1], hidden.shape[1]))
    of_bias = logits.new_zeros((1, logits.shape[1]) if bias else (0,))
    for rows in _slices(logits, max(FEWEST_ROWS, -(-logits.shape[0] // MOST_SLICES))):
        some = torch.softmax(logits[rows], 1).mul_(scale[rows])
        some.scatter_add_(1, first[rows], -scale[rows])
        torch.mm(some, weight, out=of_hidden[rows])
        of_weight.addmm_(some.t(), hidden[rows])
        if bias:
            of_bias += some.sum(0, keepdim=True)
    return of_hidden, of_weight, of_bias


def _few_rows(logits: Tensor) -> Iterator[slice]:
    return _slices(logits, SLICE_BYTES * logits.shape[0] // max(logits.nbytes, 1))


def _slices(logits: Tensor, step: int) -> Iterator[slice]:
    step = max(step, 1)
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _fake_nll(logits: Tensor, target: Tensor, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    shape = target.shape if reduction == NONE else ()
    return logits.new_empty(shape), logits.new_empty(())


def _fake_backward(gradient: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _fake_products(gradient: Tensor, logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, hidden, bias = rest[-3:]
    shapes = (logits.shape[0], weight.shape[1]), (logits.shape[1], hidden.shape[1]), (1, logits.shape[1])
    return tuple(logits.new_empty(shape) for shape in (*shapes[:2], shapes[2] if bias else (0,)))


for _function, _fake in (
    (sliced_nll, _fake_nll),
    (sliced_nll_backward, _fake_backward),
    (sliced_nll_products, _fake_products),
):
    _LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxhybrid::{_function.__name__}", _fake, lib=_LIBRARY)
