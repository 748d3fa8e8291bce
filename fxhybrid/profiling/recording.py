"""A record of what the CPU's allocator does, from torch's profilers.

Kineto's profiler runs once in a process, and while a user's own is running the older one stands in, which reports sizes
without addresses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fxhybrid.errors import ProfileError
from fxhybrid.torch_internals import (
    EventType,
    ExperimentalConfig,
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    profiler,
)

T = TypeVar("T")
_MARK = "fxhybrid::mark"
_KINETO = threading.Lock()  # held while a recording of ours runs it
Event = tuple[int, int]  # (address, bytes); negative bytes are a free


@dataclass
class Recording:
    """Holds allocator events in order of time, cut into segments at the marks."""

    segments: list[list[Event]] = field(default_factory=lambda: [[]])

    def peak_rise_bytes(self, segment: int) -> int:
        """Returns the largest (allocated - freed) bytes of blocks born in one segment."""
        return walk(self.segments[segment], {})[0]

    def mark(self) -> None:
        """Ends the segment: what comes after belongs to the next one."""
        with torch.profiler.record_function(_MARK):
            pass


def run_recordable(run: Callable[[], T]) -> T:
    """Runs something that records: in a thread of its own while a profiler records this one."""
    if not profiler._profiler_enabled():
        return run()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@contextmanager
def recording() -> Iterator[Recording]:
    """Records the allocator's events in this thread; the segments are there after the block.

    Raises:
        ProfileError: a profiler records this thread already.
    """
    if profiler._profiler_enabled():
        raise ProfileError("a torch profiler is already running; measure outside of it")
    recorded = Recording()
    if torch.autograd.profiler._is_profiler_enabled or _KINETO.locked():  # in another thread
        with _sizes(recorded):
            yield recorded
        return
    config = _config(ProfilerState.KINETO)
    with _KINETO:
        with _quiet_kineto():
            profiler._prepare_profiler(config, {ProfilerActivity.CPU})
            # Only user scopes: no events of single ops, which would cost more than all else.
            scopes = {RecordScope.USER_SCOPE}
            profiler._enable_profiler(config, {ProfilerActivity.CPU}, scopes)  # type: ignore[call-arg]
        try:
            yield recorded
        finally:
            result = profiler._disable_profiler()
    _fill(recorded, result.experimental_event_tree())


def _config(state: ProfilerState) -> ProfilerConfig:
    """Settings of a profiler that reports memory and nothing else."""
    return ProfilerConfig(state, False, True, False, False, False, ExperimentalConfig(), "")


@contextmanager
def _sizes(recorded: Recording) -> Iterator[None]:
    """Records sizes by the older profiler; a free ends the last block born of its size."""
    profiler._enable_profiler_legacy(_config(ProfilerState.CPU))
    try:
        yield
    finally:
        threads = profiler._disable_profiler_legacy()
    born: dict[int, list[int]] = {}
    address = 0
    events: list[Any] = [event for thread in threads for event in thread]  # torch's stubs call a kind a number
    for event in events:
        if event.kind() == "push" and event.name() == _MARK:
            recorded.segments.append([])
        if event.kind() != "memory_alloc":
            continue
        n_bytes = event.cpu_memory_usage()
        if n_bytes > 0:
            address += 1
            born.setdefault(n_bytes, []).append(address)
            recorded.segments[-1].append((address, n_bytes))
        elif born.get(-n_bytes):
            recorded.segments[-1].append((born[-n_bytes].pop(), n_bytes))


def _fill(recorded: Recording, tree: list[Any]) -> None:
    flat, stack = [], list(reversed(tree))
    while stack:
        event = stack.pop()
        stack.extend(reversed(event.children))
        if event.tag == EventType.Allocation:
            if event.extra_fields.device.type == "cpu":
                flat.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == _MARK:
            flat.append((event.start_time_ns, 0, 0))
    flat.sort(key=lambda item: item[0])  # stable: events of one thread already stand in order
    for _, address, n_bytes in flat:
        if address == 0:
            recorded.segments.append([])
        else:
            recorded.segments[-1].append((address, n_bytes))


def walk(events: Iterable[Event], live: dict[int, int]) -> tuple[int, int]:
    """Returns peak and final level over ``events``, from 0; ``live`` (address to bytes) is updated."""
    level = peak = 0
    for address, n_bytes in events:
        level -= live.pop(address, 0)  # a free, or a birth where another thread freed unseen
        if n_bytes > 0:
            live[address] = n_bytes
            level += n_bytes
            peak = max(peak, level)
    return peak, level


def split_at_birth(events: Sequence[Event]) -> tuple[Sequence[Event], Sequence[Event]]:
    """Returns what is freed before the first block is born, and the rest."""
    n_freed = next((i for i, (_, n_bytes) in enumerate(events) if n_bytes > 0), len(events))
    return events[:n_freed], events[n_freed:]


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keeps Kineto from writing a line to stderr at each start and stop; it reads this when first used."""
    name = "KINETO_LOG_LEVEL"
    given = name in os.environ
    os.environ.setdefault(name, "6")  # above every message
    try:
        yield
    finally:
        if not given:
            del os.environ[name]
