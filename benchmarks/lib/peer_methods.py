"""Ways to train a suite model in less memory or time, each as a loss that takes the place of the eager one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config as partitioner
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.lib.common import Bench

Loss = Callable[[], Tensor]
SMALLEST = 4096  # elements below which int8 is not worth it
EAGER, INT8, OURS, OURS_WITHOUT = "eager", "int8 saved-tensor hooks", "fxhybrid", "fxhybrid without dropout"
BOTH_OURS = (OURS, OURS_WITHOUT)
WITH_DROPOUT = ("gru", "bert", "gpt2", "t5")


@dataclass(frozen=True)
class Method:
    """Describes a way to train; ``prepare`` changes the bench's model where it needs to and gives the loss.

    Attributes:
        prepare: takes the bench and the setting.
        without_dropout: whether it runs without, since it draws other random numbers than eager does.
        models: suite models that it is for; None for all.
    """

    prepare: Callable[[Bench, str], Loss]
    without_dropout: bool = False
    models: tuple[str, ...] | None = None


def _eager(bench: Bench, _: str) -> Loss:
    return bench.case.loss


def _channels_last(bench: Bench, _: str) -> Loss:
    case = bench.case
    case.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in case.inputs)
    return lambda: case.loss_fn(case.model(*inputs, **case.kwargs), *case.loss_args)


def _checkpoints(bench: Bench, _: str) -> Loss:
    """Checkpoints every block: each module of the outermost lists of modules."""
    for block in blocks(bench.case.model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return bench.case.loss


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the elements of lists of modules that are no part of another such element."""
    found: list[nn.Module] = []
    for module in model.children():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        found += module.children() if is_list else blocks(module)
    return found


def _compiled(bench: Bench, setting: str) -> Loss:
    """Compiles model and loss by Inductor; a setting is PyTorch's own ``activation_memory_budget``."""
    compiled = torch.compile(bench.case.loss, fullgraph=True, dynamic=False)
    if not setting:
        return compiled

    def loss() -> Tensor:
        with partitioner.patch(activation_memory_budget=float(setting)):
            return compiled()

    return loss


def _int8_hooks(bench: Bench, _: str) -> Loss:
    """Stores every large saved float tensor as int8 with one scale, in ten lines."""
    parameters = {p.untyped_storage().data_ptr() for p in bench.case.model.parameters()}

    def pack(x: Tensor) -> Any:
        own = x.untyped_storage().data_ptr() in parameters
        if own or x.dtype != torch.float32 or x.numel() < SMALLEST:
            return x
        scale = x.abs().amax().clamp_min(1e-12) / 127
        return (x / scale).round_().to(torch.int8), scale

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].float().mul_(packed[1])

    def loss() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return bench.case.loss()

    return loss


def _chunked_loss(bench: Bench, _: str) -> Loss:
    """Computes head and loss some tokens at a time, by PyTorch's own function."""
    model: Any = bench.case.model
    (ids,), (target,) = bench.case.inputs, bench.case.loss_args

    def loss() -> Tensor:
        hidden = model.transformer(ids).last_hidden_state[:, :-1].flatten(0, 1)
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, model.lm_head.weight, target[:, 1:].flatten(), options=options)

    return loss


def _ours(bench: Bench, setting: str) -> Loss:
    hybrid = bench.compile(int(setting))
    return lambda: bench.loss_of(hybrid)


METHODS = {
    EAGER: Method(_eager),
    "eager without dropout": Method(_eager, without_dropout=True, models=WITH_DROPOUT),
    "eager channels_last": Method(_channels_last, models=("mobilenetv2", "resnet50", "unet")),
    "checkpoint per block": Method(_checkpoints),
    "torch.compile": Method(_compiled, without_dropout=True),
    "activation_memory_budget": Method(_compiled, without_dropout=True),
    INT8: Method(_int8_hooks),
    "linear_cross_entropy": Method(_chunked_loss, models=("gpt2",)),
    OURS: Method(_ours),
    OURS_WITHOUT: Method(_ours, without_dropout=True, models=WITH_DROPOUT),
}


def ours_for(method: str, model: str) -> str:
    """Returns the form of fxhybrid that trains a model as another way does: with dropout or without."""
    return OURS_WITHOUT if METHODS[method].without_dropout and model in WITH_DROPOUT else OURS


def switch_dropout_off(model: nn.Module) -> None:
    """Sets the rates of all dropout layers to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
