"""Planning while the user's own profiler is running: the same sizes, and a profile that is still the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import fxhybrid
from fxhybrid.passes.build_problem import calls_of
from fxhybrid.profiling.allocator import measure_step, memory_rise, memory_rises
from fxhybrid.profiling.op_profiler import profile_calls
from fxhybrid.profiling.recording import run_recordable
from tests.compare import twins

MIB = 1 << 20


@contextmanager
def profiled() -> Iterator[None]:
    """A profiler of the user's, which sees the operators around the block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.zeros(3).asinh()
        yield
        torch.zeros(3).acosh()
    assert {"aten::asinh", "aten::acosh"} <= {event.key for event in profiler.key_averages()}


def blocks() -> torch.Tensor:
    """2 MiB, then 1 MiB beside it, dropped, then 3 MiB in its place: at most 5 MiB, 2 MiB stay."""
    kept = torch.empty(2 * MIB, dtype=torch.uint8)
    torch.empty(MIB, dtype=torch.uint8)
    torch.empty(3 * MIB, dtype=torch.uint8)
    return kept


def test_sizes_are_the_same() -> None:
    with profiled():
        rise = run_recordable(lambda: memory_rise(blocks))
        several = run_recordable(lambda: memory_rises([blocks, lambda: None, blocks]))
    assert (rise.peak_rise_bytes, rise.retained_bytes) == (5 * MIB, 2 * MIB)
    assert [r.peak_rise_bytes for r in several] == [5 * MIB, 0, 5 * MIB]


def test_an_error_ends_the_recording() -> None:
    with profiled(), pytest.raises(ZeroDivisionError):
        run_recordable(lambda: memory_rise(lambda: 1 // 0))
    assert memory_rise(blocks).peak_rise_bytes == 5 * MIB


def test_operators_need_the_same_memory(tmp_path: Path) -> None:
    pair = twins(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 5)), example_inputs=(torch.randn(8, 24),))
    prepared = pair.hybrid._fxhybrid_session.first.state.prepared
    calls = list(calls_of(prepared.layout, prepared.choices))
    plain = profile_calls(calls, cache_dir=tmp_path / "plain")
    with profiled():
        found = profile_calls(calls, cache_dir=tmp_path / "profiled")
    assert {k: c.alloc_peak_bytes for k, c in found.costs.items()} == {
        k: c.alloc_peak_bytes for k, c in plain.costs.items()
    }


def test_a_new_shape_comes_up_while_a_profiler_runs() -> None:
    pair = twins(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 5)))
    x = torch.randn(8, 24)

    def step(m: nn.Module, n: int) -> None:
        m.zero_grad()
        m(x[:n]).square().mean().backward()

    pair.same(lambda m: step(m, 8))
    with profiled():
        pair.same(lambda m: step(m, 5))
    assert len(pair.hybrid.plans) == 2


def test_a_step_is_planned_while_it_is_measured() -> None:
    hybrid = fxhybrid.compile(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 5)), budget=2**20)
    x = torch.randn(8, 24)
    measured = measure_step(lambda: hybrid(x).sum().backward(), modules=hybrid, tensors=x, repeats=0)
    assert measured.peak_bytes > 0
