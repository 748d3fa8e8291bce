"""Corrections of traced graphs where torch's CPU kernels do something else than its fake tensors say.

Plans are made from fake values, so each difference would be a wrong size, or a value that no kernel takes. Strides and
types are corrected while the model is traced, since ``reshape`` decides by them between a view and a copy; what a
kernel keeps alive behind its result is corrected afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor, fx

from fxhybrid.capture.joint_graph import TAG
from fxhybrid.ops.ctc_loss import FAKES
from fxhybrid.torch_internals import (
    BypassDispatchCache,
    FakeTensorMode,
    compute_required_storage_length,
    fake_impls,
    meta_table,
    prims_common,
    suggest_memory_format,
)

aten = torch.ops.aten

# These leave the whole unreduced loss behind their result, which stays alive as long as the scalar.
_OVERSIZED: dict[Any, int] = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
# Norms in the forward pass: arguments that decide the type of the statistics (outputs 1 and 2).
_FORWARD: dict[Any, tuple[int, ...]] = {
    aten.native_layer_norm.default: (2, 3),
    aten.native_group_norm.default: (1, 2),
    aten.native_batch_norm.default: (1, 2, 3, 4),
    aten._native_batch_norm_legit.default: (1, 2, 3, 4),
    aten._native_batch_norm_legit.no_stats: (1, 2),
    aten._native_batch_norm_legit_functional.default: (1, 2, 3, 4),
}
_BACKWARD = (
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.native_batch_norm_backward.default,
)
_NORMS = (*_FORWARD, *_BACKWARD)
_IN_INPUT_SIZE = (aten.col2im.default, aten.im2col.default)  # work in a storage of at least their input's size
_TORCHS_OWN = {op: fake_impls.op_implementations_dict.get(op) for op in (*_NORMS, *_IN_INPUT_SIZE)}
_ALWAYS_CONTIGUOUS = (aten.native_layer_norm.default, aten.native_layer_norm_backward.default)
_GROUP_NORMS = (aten.native_group_norm.default, aten.native_group_norm_backward.default)
_REDUCED = (torch.bfloat16, torch.float16)
_NO_REDUCTION = 0


@contextlib.contextmanager
def kernel_norms() -> Iterator[None]:
    """Lets fake norms give the strides and types that the CPU kernels give, while a model is traced.

    What they give must not reach the cache of fake tensors that the whole process shares: see ``own_fake_tensors``.
    """
    # A Python decomposition would come first, unless torch takes it that the operator has a meta function.
    ours = {**dict.fromkeys(_NORMS, _norm), **dict.fromkeys(_IN_INPUT_SIZE, _columns)}
    with replaced_entries(fake_impls.op_implementations_dict, ours | FAKES), replaced_entries(meta_table, ours):
        yield


@contextlib.contextmanager
def contiguous_first() -> Iterator[None]:
    """Lets elementwise results be contiguous where all operands are, as the kernels' are.

    Of a tensor of one pixel, torch's fake tensors take strides of channels_last as they are; kernels ask whether it is
    contiguous first.
    """
    torchs_own = prims_common.compute_elementwise_output_logical_to_physical_perm

    def order(*tensors: Any, **options: Any) -> Any:
        shaped = [t for t in tensors if isinstance(t, Tensor) and t.dim() > 1]
        if any(isinstance(size, torch.SymInt) for t in shaped for size in t.shape):
            return torchs_own(*tensors, **options)
        if len({t.shape for t in shaped}) == 1 and all(t.is_contiguous() for t in shaped):
            return list(range(shaped[0].dim())), False
        return torchs_own(*tensors, **options)

    with patch.object(prims_common, "compute_elementwise_output_logical_to_physical_perm", order):
        yield


@contextlib.contextmanager
def own_fake_tensors() -> Iterator[None]:
    """Gives a trace a cache of fake tensors of its own, which leaves out what it would give back too small.

    The cache makes a tensor anew from its shape and strides, so it forgets a storage that is larger than its tensor
    (a slice of an operator's own buffer).
    """
    name = "_validate_output_for_cache_entry"
    check = getattr(FakeTensorMode, name)

    def check_storage(self: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        check(self, state, key, func, args, kwargs, output)
        if isinstance(output, Tensor) and not getattr(func, "is_view", False) and _has_larger_storage(output):
            raise BypassDispatchCache("storage is larger than its tensor")

    with patch.object(FakeTensorMode, "cache", {}), patch.object(FakeTensorMode, name, check_storage):
        yield


def _has_larger_storage(value: Tensor) -> bool:
    size_bytes = value.untyped_storage().nbytes()
    if not isinstance(size_bytes, int):
        return _is_symbolically_larger(value, size_bytes)
    return size_bytes != compute_required_storage_length(value.shape, value.stride(), 0) * value.element_size()


def _is_symbolically_larger(value: Tensor, size_bytes: torch.SymInt) -> bool:
    """Whether arithmetic alone, which leaves no guard, does not show that a tensor fills its storage."""
    steps = (
        (_expression(size) - 1) * _expression(stride) for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    needed_bytes = (1 + sum(steps)) * value.element_size()
    return bool(sympy.expand(needed_bytes - _expression(size_bytes)) != 0)


def _expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)


@contextlib.contextmanager
def replaced_entries(table: dict[Any, Any], entries: Mapping[Any, Any]) -> Iterator[None]:
    """Puts ``entries`` into ``table`` for a while; None leaves an operator out."""
    before = {op: table.pop(op, None) for op in entries}
    table.update({op: entry for op, entry in entries.items() if entry is not None})
    try:
        yield
    finally:
        for op, entry in before.items():
            table.pop(op, None)
            if entry is not None:
                table[op] = entry


def by_torch(own: Any, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Computes an operator's fake results as torch does.

    Args:
        own: torch's entry for the operator in its table of fakes; None where it has none.
        op: that has another entry now.
        args: of the call.
        kwargs: of the call.
    """
    entry = replaced_entries(fake_impls.op_implementations_dict, {op: own})
    with entry, replaced_entries(meta_table, {op: None}):
        return op(*args, **kwargs)


def _norm(fake_mode: Any, op: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """Computes the fake outputs of a norm, or of its backward pass, as the CPU kernels lay them out."""
    x = args[1] if op in _BACKWARD else args[0]
    with fake_mode:
        outputs = _gradients(op, x, args) if x.device.type == "cpu" and not kwargs else None
        if outputs is None:
            outputs = by_torch(_TORCHS_OWN[op], op, args, kwargs)
        if x.device.type != "cpu":
            return tuple(outputs)
        layout = torch.contiguous_format if op in _ALWAYS_CONTIGUOUS else _layout(op, x, args[0])
        first = None if outputs[0] is None else torch.empty_like(x, memory_format=layout)
        if op in _BACKWARD or x.dtype not in _REDUCED:
            return (first, *outputs[1:])
        dtypes = {args[i].dtype for i in _FORWARD[op] if isinstance(args[i], Tensor)}
        statistics = torch.float32 if torch.float32 in dtypes else x.dtype
        # Running statistics (outputs 3 and 4 of the functional form) keep their type, which is all others' too.
        return (first, *(None if t is None else torch.empty_like(t, dtype=statistics) for t in outputs[1:]))


def _gradients(op: Any, x: Tensor, args: tuple[Any, ...]) -> Sequence[Tensor | None] | None:
    """Returns fake gradients of the most frequent norms at once; None for others.

    torch's decompositions take thirty operators for each, which is a tenth of the trace of a convolutional net.
    """
    if op is aten.native_batch_norm_backward.default:
        weight, mask = args[2], args[9]
        dtype = x.dtype if weight is None else weight.dtype
        parts = (x.new_empty(x.shape[1], dtype=dtype) if wanted else None for wanted in mask[1:])
        return (x, *parts)
    if op is aten.native_layer_norm_backward.default:
        parameters, mask = args[5:7], args[7]
        inner = x.shape[x.dim() - len(args[2]) :]
        parts = (
            x.new_empty(inner, dtype=parameter.dtype) if wanted and parameter is not None else None
            for parameter, wanted in zip(parameters, mask[1:], strict=True)
        )
        return (x if mask[0] else None, *parts)
    return None


def _layout(op: Any, x: Tensor, first: Tensor) -> torch.memory_format:
    """The order in which a kernel writes; one pixel counts as both orders, of which batch norms take the plain one."""
    wanted = suggest_memory_format(x)
    if op in _GROUP_NORMS or not x.is_contiguous() or suggest_memory_format(first) != wanted:
        return wanted
    return torch.contiguous_format


def _columns(fake_mode: Any, op: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Computes the fake result of ``fold`` or ``unfold`` in a storage of the kernel's size, unless it is symbolic."""
    with fake_mode:
        result = by_torch(_TORCHS_OWN[op], op, (x, *args), kwargs)
        assert isinstance(result, Tensor)
        numbers = x.numel(), result.numel()
        if x.device.type != "cpu" or not all(isinstance(n, int) for n in numbers) or numbers[0] <= numbers[1]:
            return result
        return x.new_empty(numbers[0]).narrow(0, 0, numbers[1]).view(result.shape)


def fix_kernel_results(module: fx.GraphModule) -> None:
    """Corrects, in place, what kernels leave behind their results and in which type they compute."""
    for node in list(module.graph.nodes):
        if node.target in _OVERSIZED:
            _shrink(node)
        elif node.target is aten.native_dropout_backward.default:
            _round_noise(node)
        elif node.target is aten._embedding_bag.default:
            _widen_bags(node)
    module.recompile()


def _shrink(node: fx.Node) -> None:
    """Copies a reduced loss, so that the storage behind it dies at once."""
    position = _OVERSIZED[node.target]
    reduction = node.args[position] if len(node.args) > position else node.kwargs.get("reduction", 1)
    if reduction == _NO_REDUCTION:
        return
    with node.graph.inserting_after(node):
        copied = node.graph.call_function(aten.clone.default, (node,))
    copied.meta = {"val": node.meta["val"].clone(), TAG: node.meta[TAG]}
    node.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)


def _widen_bags(node: fx.Node) -> None:
    """Counts what is behind two results: the bag of each index, and one more; a size for each offset."""
    outputs: list[Tensor] = list(node.meta["val"])
    offsets = node.args[2]
    assert isinstance(offsets, fx.Node)
    _, bags, sizes, _ = outputs
    if bags.device.type != "cpu":
        return
    n_indices = bags.shape[0]
    if isinstance(n_indices, torch.SymInt) or n_indices > 0:  # none where the fastest kernel runs
        outputs[1] = bags.new_empty(n_indices + 1).narrow(0, 0, n_indices)
    outputs[2] = sizes.new_empty(offsets.meta["val"].shape[0]).narrow(0, 0, sizes.shape[0])
    node.meta["val"] = tuple(outputs)
    for part in node.users:
        part.meta["val"] = outputs[part.args[1]]  # type: ignore[index]  # each is a getitem


def _round_noise(node: fx.Node) -> None:
    """Rounds dropout's noise: eager on the CPU multiplies with noise in the input's type, traced dropout in float32."""
    gradient, mask, scale = node.args
    value: Tensor = node.meta["val"]
    if value.device.type != "cpu" or value.dtype not in _REDUCED:
        return
    assert isinstance(mask, fx.Node)
    noise = mask
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten._to_copy.default, (), {"dtype": value.dtype}),
        (aten.mul.Tensor, (scale,), {}),
    ]
    with node.graph.inserting_before(node):
        for target, args, kwargs in steps:
            noise = node.graph.call_function(target, (noise, *args), kwargs)
            noise.meta = {"val": torch.empty_like(mask.meta["val"], dtype=value.dtype), TAG: node.meta[TAG]}
        product = node.graph.call_function(aten.mul.Tensor, (gradient, noise))
    product.meta = node.meta
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)
