"""What a training step really takes, as the device's allocator counts it.

On CPU the allocator's events come from the torch profiler, which costs about a millisecond to start
and stop and some 20 microseconds per event; on CUDA the allocator keeps its own statistics.

The profiler reports a free only if it has seen the block's birth, and it may report one of a wrong
size where the address was used in an earlier session. So blocks are followed by address here, frees of
unknown blocks are left out, and a whole step is recorded before the one that is evaluated.

Counted is what the calling thread allocates (autograd runs a CPU backward pass in it); blocks that a
step's own threads allocate are not seen. The garbage collector is off while a step is recorded:
tensors that only a reference cycle holds count as live.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.profiling.collector import paused_collector
from fxhybrid.profiling.recording import recording, walk
from fxhybrid.torch_internals import tree_leaves
from fxhybrid.units import format_bytes


@dataclass(frozen=True)
class StepMeasurement:
    """Holds the peak of one training step and the seconds it takes.

    Attributes:
        base_bytes: parameters, buffers, gradients, optimizer state and tensors named by the caller, as
            they are when the step starts; every storage once.
        rise_bytes: largest (allocated - freed) bytes since the step's start.
        peak_bytes: ``base_bytes + rise_bytes``.
        seconds: median of the unprofiled runs; nan without any.
        stray_bytes: what an earlier step allocated and still holds at the start although it is no part of
            ``base_bytes`` (an output the caller kept, a cache). Not in ``peak_bytes``. CPU only, else 0.
    """

    base_bytes: int
    rise_bytes: int
    peak_bytes: int
    seconds: float
    stray_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"peak {format_bytes(self.peak_bytes)} (base {format_bytes(self.base_bytes)}"
            f" + rise {format_bytes(self.rise_bytes)}), {self.seconds * 1e3:.1f} ms"
        )


@dataclass(frozen=True)
class MemoryRise:
    """Holds what one call allocates.

    Attributes:
        peak_rise_bytes: largest (allocated - freed) bytes within the call.
        retained_bytes: what of it is still allocated at its end, while the result is held.
        result: what the call returned (None from :func:`memory_rises`).
    """

    peak_rise_bytes: int
    retained_bytes: int
    result: Any = None


def measure_step(
    step: Callable[[], object],
    *,
    modules: Iterable[nn.Module] | nn.Module = (),
    tensors: object = (),
    optimizer: torch.optim.Optimizer | None = None,
    repeats: int = 3,
) -> StepMeasurement:
    """Measures the allocator-level peak and the seconds of a training step.

    ``step`` runs ``repeats`` + 2 times: unprofiled for the seconds, then once recorded as a warm-up, then
    once evaluated, which starts in the state that the warm-up left (``.grad`` included).

    Args:
        step: does forward and backward (and ``zero_grad`` where wanted); what it returns is dropped.
        modules: their parameters, buffers and gradients belong to the base.
        tensors: inputs, targets and so on, in any nesting; they belong to the base.
        optimizer: its state tensors belong to the base.
        repeats: unprofiled runs; 0 to skip the timing.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise InvalidArgument(f"repeats must be an integer of 0 or more, got {repeats!r}")
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    tensors = list(tensors) if isinstance(tensors, Iterator) else tensors
    device = _device_of(_resident(modules, tensors, optimizer))
    seconds = _median_seconds(step, repeats, device)
    if device.type == "cuda":
        step()
        base_bytes = sum(_storages(_resident(modules, tensors, optimizer)).values())
        rise_bytes, stray_bytes = _cuda_rise(step, device).peak_rise_bytes, 0
    else:
        with recording() as recorded, _collected():
            step()
            gc.collect()
            base = _storages(_resident(modules, tensors, optimizer))
            recorded.mark()
            step()
            recorded.mark()
        base_bytes = sum(base.values())
        live: dict[int, int] = {}
        walk(recorded.segments[0], live)
        stray_bytes = sum(n_bytes for address, n_bytes in live.items() if address not in base)
        rise_bytes, _ = walk(recorded.segments[1], live)
    return StepMeasurement(base_bytes, rise_bytes, base_bytes + rise_bytes, seconds, stray_bytes)


def memory_rise(fn: Callable[[], object], *, device: torch.device | str = "cpu") -> MemoryRise:
    """Runs ``fn`` once and tells what it allocates on ``device``; blocks born before are left out on CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_rise(fn, device)
    with recording() as recorded, _collected():
        recorded.mark()
        result = fn()
        recorded.mark()
    return MemoryRise(*walk(recorded.segments[1], {}), result)


def memory_rises(fns: Sequence[Callable[[], object]], *, device: torch.device | str = "cpu") -> list[MemoryRise]:
    """Does what :func:`memory_rise` does for many short calls in one recording; every result is dropped at once."""
    device = torch.device(device)
    if device.type == "cuda":
        return [replace(_cuda_rise(fn, device), result=None) for fn in fns]
    with recording() as recorded, _collected():
        for fn in fns:
            recorded.mark()
            result = fn()
            recorded.mark()
            del result
    # segments: before the first call, call 0, between, call 1, between ...
    return [MemoryRise(*walk(segment, {})) for segment in recorded.segments[1::2]]


@contextmanager
def _collected() -> Iterator[None]:
    """Collects garbage, then leaves it alone until the block ends."""
    gc.collect()
    with paused_collector():
        yield


def _cuda_rise(fn: Callable[[], object], device: torch.device) -> MemoryRise:
    with _collected():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start_bytes = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak_bytes = torch.cuda.max_memory_allocated(device)
        return MemoryRise(peak_bytes - start_bytes, torch.cuda.memory_allocated(device) - start_bytes, result)


def _median_seconds(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    readings = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        readings.append(time.perf_counter() - start_s)
    return statistics.median(readings) if readings else float("nan")


def _resident(modules: Sequence[nn.Module], tensors: object, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Returns all tensors of the base, some maybe twice; sparse ones as their parts."""
    found: list[Any] = tree_leaves(tensors)
    for module in modules:
        found += [*module.parameters(), *module.buffers()]
        found += [parameter.grad for parameter in module.parameters()]
    if optimizer is not None:
        found += tree_leaves([dict(state) for state in optimizer.state.values()])
    dense = []
    for tensor in found:
        if isinstance(tensor, Tensor):
            sparse = tensor.layout == torch.sparse_coo
            dense += [tensor._indices(), tensor._values()] if sparse else [tensor]
    return dense


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Maps the address to the bytes of every storage that holds anything."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _device_of(tensors: Iterable[Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        names = ", ".join(sorted(str(device) for device in devices))
        raise InvalidArgument(f"a step on {names} cannot be measured; use the CPU or one CUDA device")
    return devices.pop() if devices else torch.device("cpu")
