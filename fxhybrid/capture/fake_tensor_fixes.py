"""Corrections of a traced graph where torch's CPU kernels do something else than its fake tensors tell.

Plans are made from fake values, so each difference would be a wrong size, or a value that no kernel takes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxhybrid.capture.joint_graph import TAG

aten = torch.ops.aten

# These leave the whole unreduced loss behind their result, which stays alive as long as the scalar.
_OVERSIZED: dict[Any, int] = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
# Norms: arguments that decide the type of the statistics (outputs 1 and 2).
_NORMS: dict[Any, tuple[int, ...]] = {
    aten.native_layer_norm.default: (2, 3),
    aten.native_group_norm.default: (1, 2),
    aten.native_batch_norm.default: (1, 2, 3, 4),
    aten._native_batch_norm_legit.default: (1, 2, 3, 4),
    aten._native_batch_norm_legit.no_stats: (1, 2),
    aten._native_batch_norm_legit_functional.default: (1, 2, 3, 4),
}
_REDUCED = (torch.bfloat16, torch.float16)
_NO_REDUCTION = 0


def follow_kernels(module: fx.GraphModule) -> None:
    """Corrects ``module`` in place."""
    for node in list(module.graph.nodes):
        if node.target in _OVERSIZED:
            _shrink(node)
        elif node.target in _NORMS:
            _type_statistics(node)
        elif node.target is aten.native_dropout_backward.default:
            _round_noise(node)
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


def _round_noise(node: fx.Node) -> None:
    """Eager dropout on the CPU multiplies with noise in the input's type, the traced one with a float."""
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


def _type_statistics(node: fx.Node) -> None:
    """Statistics of a bfloat16 input are float32 where weights or running statistics are."""
    value: tuple[Tensor, ...] = node.meta["val"]
    if value[0].device.type != "cpu" or value[0].dtype not in _REDUCED:
        return
    others = [n.meta["val"] for i in _NORMS[node.target] if isinstance(n := node.args[i], fx.Node)]
    dtypes = {t.dtype for t in others}
    mixed = torch.float32 in dtypes
    statistics = torch.float32 if mixed else value[0].dtype
    # Running statistics (outputs 3 and 4 of the functional form) keep their type, which is all others' too.
    new = (value[0], *(_retyped(t, statistics) for t in value[1:]))
    node.meta["val"] = new
    for user in node.users:
        if user.target is operator.getitem:
            user.meta["val"] = operator.getitem(new, user.args[1])


def _retyped(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype is dtype else torch.empty_like(value, dtype=dtype)
