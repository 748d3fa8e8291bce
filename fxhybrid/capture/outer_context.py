"""Refuses what wraps a planned module from outside and cannot work: wrappers of models, transforms, checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from fxhybrid.capture.planning_lock import PLANNING
from fxhybrid.errors import CaptureError, InvalidArgument
from fxhybrid.torch_internals import is_fx_symbolic_tracing, is_jit_tracing, saved_tensor_hooks, transform_stack

CHECKPOINT = (
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) runs around a planned step, whose plan may differ "
    "when it runs again. A plan recomputes by itself: call the module without checkpoint, at a smaller budget; or pass "
    "use_reentrant=True; or checkpoint parts inside the model, which are planned with it"
)
TRANSFORM = (
    "a torch.func transform (grad, vmap, jvp, jacrev) runs around a planned step, which only a backward pass can "
    "differentiate. Transform inside the model's forward or inside loss_fn: it is planned there. For gradients call "
    "torch.autograd.grad on what torch.func.functional_call(module, parameters, args) returns; or transform the plain "
    "model that was compiled"
)
FORWARD_MODE = (
    "an argument carries a forward-mode tangent (torch.autograd.forward_ad), which a planned step does not push "
    "forward. Use the plain model that was compiled for this call"
)
EXPORT = (
    "a tracer (torch.jit.trace, torch.export, torch.fx) runs around a planned step. Call model.eval() first, or export "
    "the plain model that was compiled"
)
FSDP = (
    "{found} keeps parameters in pieces and gathers them outside of the plan, so that no plan would be right. Compile "
    "the plain model, and train in parallel with DistributedDataParallel(fxhybrid.compile(model, ...))"
)


def refuse_wrapper(model: nn.Module) -> None:
    """Refuses models inside a wrapper that does work of its own around the forward pass.

    Raises:
        InvalidArgument: names the wrapper and the right order.
    """
    name = type(model).__name__
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        raise InvalidArgument(
            f"the model is wrapped in {name}, which copies and exchanges tensors outside of the graph; compile the "
            "model inside, then wrap: DistributedDataParallel(fxhybrid.compile(model, ...))"
        )
    refuse_sharded(model)


def refuse_sharded(model: nn.Module) -> None:
    """Refuses models whose parameters are kept in pieces.

    Raises:
        InvalidArgument: names what keeps them and what to do instead.
    """
    for name in ("FSDPModule", "FullyShardedDataParallel"):
        kind = getattr(sys.modules.get("torch.distributed.fsdp"), name, None)
        if kind is not None and any(isinstance(part, kind) for part in model.modules()):
            raise InvalidArgument(FSDP.format(found=f"{name} (FSDP)"))
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if kind is not None and any(isinstance(p, kind) for p in model.parameters()):
        raise InvalidArgument(FSDP.format(found="DTensor"))


def refuse_parallel() -> None:
    """Refuses to update parameters by the gradients of one process of several.

    Raises:
        InvalidArgument: several processes train together.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise InvalidArgument(
            "step_in_backward=True updates parameters by the gradients of this process alone, before those of the "
            f"{distributed.get_world_size()} processes of the group are averaged; leave it out"
        )


def refuse_transforms(tensors: Iterable[Tensor]) -> None:
    """Refuses a call inside a transform or a checkpoint that runs around the planned step.

    Args:
        tensors: the call's arguments.

    Raises:
        CaptureError: names what runs around, and what to do instead.
    """
    if transform_stack() is not None:
        raise CaptureError(TRANSFORM)
    unpack: Any = forward_ad.unpack_dual  # has no types
    level = forward_ad._current_level  # noqa: SLF001 (no public name)
    if level >= 0 and any(unpack(t).tangent is not None for t in tensors):
        raise CaptureError(FORWARD_MODE)
    hooks = saved_tensor_hooks(True)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
        raise CaptureError(CHECKPOINT)
    refuse_export()


def refuse_export() -> None:
    """Refuses a call by a tracer that makes another form of the model.

    Raises:
        CaptureError: says what to do instead.
    """
    if is_jit_tracing() or torch.compiler.is_exporting():
        raise CaptureError(EXPORT)
    if is_fx_symbolic_tracing():
        with PLANNING:  # the mark is the whole process's: another thread may be planning
            is_around = is_fx_symbolic_tracing()
        if is_around:
            raise CaptureError(EXPORT)
