"""Strides of results where torch's CPU kernels lay them out in another way than its fake tensors say.

``reshape`` decides by strides between a view and a copy: a wrong one is a view that no kernel takes, or other rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxhybrid.capture.fake_tensor_fixes import by_torch, replaced_entries
from fxhybrid.torch_internals import fake_impls, meta_table, suggest_memory_format, tree_map

aten = torch.ops.aten
Layout = Callable[[Tensor, tuple[Any, ...]], Tensor]


def _contiguous(result: Tensor, _: tuple[Any, ...]) -> Tensor:
    return torch.empty_like(result, memory_format=torch.contiguous_format)


def _format_of(position: int) -> Layout:
    """The memory format of an operand."""

    def layout(result: Tensor, args: tuple[Any, ...]) -> Tensor:
        return torch.empty_like(result, memory_format=suggest_memory_format(args[position]))

    return layout


def _as_sum_of(*positions: int) -> Layout:
    """The layout of elementwise kernels, which follows their operands in the order in which the kernel reads them."""

    def layout(result: Tensor, args: tuple[Any, ...]) -> Tensor:
        total = sum(args[i] for i in positions)
        assert isinstance(total, Tensor)
        return torch.empty_like(total, dtype=result.dtype)

    return layout


_FIRST_TWO, _RRELU = _as_sum_of(0, 1), _as_sum_of(2, 0)
_FORMAT, _FORMAT_OF_INPUT = _format_of(0), _format_of(1)
_LAYOUTS: dict[Any, Layout] = {
    aten.mse_loss_backward.default: _contiguous,
    aten.smooth_l1_loss_backward.default: _contiguous,
    aten.huber_loss_backward.default: _contiguous,
    aten._log_softmax_backward_data.default: _contiguous,
    aten.glu_backward.default: _contiguous,
    aten.pow.Scalar: _contiguous,
    aten.log_sigmoid_forward.default: _contiguous,
    aten.nll_loss2d_forward.default: _contiguous,
    aten.normal.Tensor_Tensor: _contiguous,
    aten.roll.default: _FORMAT,
    aten.pixel_shuffle.default: _FORMAT,
    aten.pixel_unshuffle.default: _FORMAT,
    aten.channel_shuffle.default: _FORMAT,
    aten.max_unpool2d.default: _FORMAT,
    aten.reflection_pad2d_backward.default: _FORMAT_OF_INPUT,
    aten.replication_pad2d_backward.default: _FORMAT_OF_INPUT,
    aten.reflection_pad3d.default: _FORMAT,
    aten.reflection_pad3d_backward.default: _FORMAT_OF_INPUT,
    aten.replication_pad3d.default: _FORMAT,
    aten.replication_pad3d_backward.default: _FORMAT_OF_INPUT,
    aten.native_dropout_backward.default: _FIRST_TWO,
    aten.elu_backward.default: _as_sum_of(0, 5),
    aten.hardtanh_backward.default: _FIRST_TWO,
    aten.hardswish_backward.default: _FIRST_TWO,
    aten.hardsigmoid_backward.default: _FIRST_TWO,
    aten.softplus_backward.default: _FIRST_TWO,
    aten.logit_backward.default: _FIRST_TWO,
    aten.rrelu_with_noise_backward.default: _RRELU,
    aten.xlogy.Tensor: _FIRST_TWO,
    aten.copysign.Tensor: _FIRST_TWO,
    aten.div.Tensor_mode: _FIRST_TWO,
    aten.ldexp.Tensor: _FIRST_TWO,
    aten.logaddexp.default: _FIRST_TWO,
    aten.binary_cross_entropy.default: _FIRST_TWO,
}
# Whether they follow their gradient's memory format. Those of torch's meta functions take no symbolic sizes.
_FOLLOWS_GRADIENT = {
    aten.upsample_linear1d_backward.default: False,
    aten.upsample_nearest1d_backward.default: False,
    aten._upsample_nearest_exact1d_backward.default: False,  # noqa: SLF001 (an operator's name)
    aten.upsample_bilinear2d_backward.default: True,
    aten.upsample_bicubic2d_backward.default: False,
    aten._upsample_bicubic2d_aa_backward.default: False,  # noqa: SLF001 (an operator's name)
    aten.upsample_nearest3d_backward.default: False,
    aten._upsample_nearest_exact3d_backward.default: False,  # noqa: SLF001 (an operator's name)
    aten.upsample_trilinear3d_backward.default: True,
}
_TORCHS_OWN = {op: fake_impls.op_implementations_dict.get(op) for op in (*_LAYOUTS, *_FOLLOWS_GRADIENT)}


@contextlib.contextmanager
def kernel_layouts() -> Iterator[None]:
    """Lets fake tensors have the strides of the CPU kernels' results, while a model is traced."""
    # A Python decomposition would come first, unless torch takes it that the operator has a meta function.
    ours = {**dict.fromkeys(_LAYOUTS, _fake), **dict.fromkeys(_FOLLOWS_GRADIENT, _upsampled)}
    with replaced_entries(fake_impls.op_implementations_dict, ours), replaced_entries(meta_table, ours):
        yield


def _upsampled(fake_mode: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Computes the fake input gradient of an interpolation."""
    gradient, _, input_size, *_ = args
    with fake_mode:
        if all(isinstance(size, int) for size in input_size):
            return by_torch(_TORCHS_OWN[op], op, args, kwargs)
        made = gradient.new_empty(input_size)
        return made.contiguous(memory_format=suggest_memory_format(gradient)) if _FOLLOWS_GRADIENT[op] else made


def _fake(fake_mode: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Computes an operator's fake results, and gives them the kernel's strides."""
    with fake_mode:
        results: Any = by_torch(_TORCHS_OWN[op], op, args, kwargs)
        tensors = [a for a in args if isinstance(a, Tensor) and a.dim() > 0]
        if any(t.device.type != "cpu" for t in tensors):
            return results
        return tree_map(lambda result: _laid_out(op, result, tensors, args), results)


def _laid_out(op: Any, result: Tensor, tensors: list[Tensor], args: tuple[Any, ...]) -> Tensor:
    if result.dim() < 2 or all(t.is_contiguous() for t in (result, *tensors)):
        return result
    return _LAYOUTS[op](result, args)
