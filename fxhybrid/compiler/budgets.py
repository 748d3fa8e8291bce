"""From a budget as a user names it to bytes."""

from __future__ import annotations

import os

import torch
from torch import nn

from fxhybrid.ir.problem import Problem
from fxhybrid.profiling.state_bytes import storage_bytes
from fxhybrid.profiling.system_memory import available_bytes, read_memory
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.units import CheckedBudget, NamedBudget

# What of the free memory a plan may count on. A process on the CPU grows by up to 1.45 times what its allocator counts,
# since glibc keeps freed blocks, unless the threshold for blocks of their own is fixed.
FREE_SHARE = 0.9
FREE_SHARE_GLIBC = 0.65


def resolve_budget(
    budget: CheckedBudget,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    save_all_bytes: int,
    problem: Problem,
) -> int:
    """Returns a budget in bytes.

    Args:
        budget: as it was asked for; for the smallest one, the bound below which no plan can be is returned, with which
            planning finds the smallest peak.
        model: the user's; ``"auto"`` counts what it and the optimizer hold already as available.
        optimizer: whose state counts.
        save_all_bytes: what a share is a share of.
        problem: the step.
    """
    if isinstance(budget, NamedBudget):
        return auto_bytes(model, optimizer) if budget is NamedBudget.AUTO else peak_lower_bound(problem)[0]
    return budget if isinstance(budget, int) else int(budget * save_all_bytes)


def auto_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Returns what a step of the model can take: what it holds already, and a share of what is free now.

    Free is what the process's control groups and limits leave on the CPU, and on a GPU what the driver and PyTorch's
    allocator have free.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    states = optimizer.state.values() if optimizer is not None else ()
    tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    device = next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))
    return storage_bytes(tensors) + free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Returns the share of the memory free on a device that plans may count on."""
    if device.type == "cuda":
        reading = read_memory(str(device))
        kept = int(torch.cuda.memory_allocated(device))
        return int(FREE_SHARE * (reading.available_bytes - kept))
    is_fixed = "MALLOC_MMAP_THRESHOLD_" in os.environ
    return int((FREE_SHARE if is_fixed else FREE_SHARE_GLIBC) * available_bytes())
