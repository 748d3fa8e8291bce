"""Budgets as people write them, and the bytes that a step cannot do without."""

from __future__ import annotations

import copy
import math
import re
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument

Budget = int | float | str
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_HELP = 'give bytes (int), text such as "512MiB", or a float in (0, 1] as a share of the save-all peak'


def check_budget(budget: Budget) -> int | float:
    """The budget as bytes (int) or as a share in (0, 1] (float).

    Raises:
        InvalidArgument: not a budget; says what one looks like.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise InvalidArgument(f"budget is {budget!r}; {_HELP}")
    if isinstance(budget, str):
        return _parse_bytes(budget)
    if isinstance(budget, float):
        if not math.isfinite(budget) or not 0 < budget <= 1:
            raise InvalidArgument(f"budget is {budget!r}, but a float must be in (0, 1]; {_HELP}")
        return budget
    if budget <= 0:
        raise InvalidArgument(f"budget is {budget} bytes, but it must be positive; {_HELP}")
    return budget


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise InvalidArgument(f"budget is {text!r}; units are {', '.join(u for u in _UNITS if u)}; {_HELP}")
    n_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    if n_bytes <= 0:
        raise InvalidArgument(f"budget is {text!r}, which is no positive number of bytes; {_HELP}")
    return n_bytes


def check_bytes(name: str, value: object) -> int:
    """``value`` if it is a whole number of bytes of at least 0, else InvalidArgument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"{name} is {value!r}; it must be a whole number of bytes of at least 0")
    return value


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of one full set of parameter gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of the optimizer's state once it is complete.

    State that exists is counted; for parameters that have none yet, the optimizer takes one step on a
    one-element stand-in, and its state is scaled to the parameter.
    """
    if optimizer is None:
        return 0
    total = 0
    for group in optimizer.param_groups:
        per_element: Callable[[Tensor], int] | None = None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                total += storage_bytes(v for v in state.values() if isinstance(v, Tensor))
            elif parameter.requires_grad:
                per_element = per_element or _state_bytes(optimizer, group)
                total += per_element(parameter)
    return total


def _state_bytes(optimizer: torch.optim.Optimizer, group: dict[str, object]) -> Callable[[Tensor], int]:
    stand_in = nn.Parameter(torch.zeros(1, 1))
    stand_in.grad = torch.zeros(1, 1)
    twin = copy.copy(optimizer)
    twin.__dict__ = {**optimizer.__dict__, "param_groups": [{**group, "params": [stand_in]}]}
    twin.state = type(optimizer.state)(optimizer.state.default_factory)
    type(optimizer).step(twin)
    tensors = [v for v in twin.state[stand_in].values() if isinstance(v, Tensor)]
    shaped = sum(t.numel() == 1 and t.dim() > 0 for t in tensors)
    constant = sum(t.nbytes for t in tensors if t.dim() == 0)
    return lambda parameter: shaped * parameter.nbytes + constant


def available_bytes() -> int:
    """Memory that this process can still take: free memory, the control group's and the process's limits."""
    limits = [_meminfo("MemAvailable")]
    used = _status("VmData")
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft - (used if kind == resource.RLIMIT_DATA else _status("VmSize")))
    limits.append(_cgroup_free())
    return max(min(limits), 0)


def _meminfo(field: str) -> int:
    return _field(Path("/proc/meminfo"), field)


def _status(field: str) -> int:
    return _field(Path("/proc/self/status"), field) if Path("/proc/self/status").exists() else 0


def _field(path: Path, field: str) -> int:
    """Bytes of one ``Name:  n kB`` line; without the file, as much as can be (nothing is known)."""
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


def _cgroup_free() -> int:
    root = Path("/sys/fs/cgroup")
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((root / limit).read_text()) - int((root / usage).read_text())
        except (OSError, ValueError):
            continue
    return 1 << 62
