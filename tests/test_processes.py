"""Several processes, and files that are corrupt, foreign, cut off or cannot be written."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxhybrid
from fxhybrid import Plan, PlanMismatchError
from fxhybrid.codecs.kernels import cpu
from fxhybrid.profiling.cost_cache import OpCost, read_costs, write_costs
from tests.compare import twins
from tests.models import WIDTH, mlp

X = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"budget": 1.0, "solver": "mps", "compression": "lossless"}
COSTS = {"a": OpCost(1e-3, 100), "b": OpCost(2e-3, 0)}


def step(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss = model(X).square().mean()
    loss.backward()
    return loss


def test_forked_workers_feed_a_planned_model() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=32, num_workers=2, multiprocessing_context="fork")
    pair = twins(mlp().train())

    def epoch(model: nn.Module) -> Tensor:
        model.zero_grad()
        losses = [model(x).square().mean() for (x,) in loader]  # workers start while a plan is at work
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    pair.hybrid(X[:32])
    pair.hybrid.set_budget(1 << 30)
    pair.same(epoch)


def train_in_child(model: nn.Module, results: Any) -> None:
    """Trains in another process, planning there if need be."""
    torch.set_num_threads(1)
    loss = step(model)
    results.put((loss.item(), [p.grad.numpy().copy() for p in model.parameters()]))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_planned_model_trains_in_another_process(start: str) -> None:
    context = multiprocessing.get_context(start)
    pair = twins(mlp().train(), example_inputs=(X,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent
    try:
        results = context.Queue()
        children = [context.Process(target=train_in_child, args=(pair.hybrid, results)) for _ in range(2)]
        for child in children:
            child.start()
        found = [results.get(timeout=300) for _ in children]
        for child in children:
            child.join()
        loss = step(pair.plain)
    finally:
        torch.set_num_threads(threads)
    for other, gradients in found:
        assert other == loss.item()
        assert all(
            torch.equal(torch.from_numpy(g), p.grad) for g, p in zip(gradients, pair.plain.parameters(), strict=True)
        )


def write_many(path: Path, name: str) -> None:
    for i in range(20):
        write_costs(path, {f"{name}{i}": OpCost(1e-3, i)})
        assert all(cost.seconds == 1e-3 for cost in read_costs(path).values()), "a file is whole at any time"


def test_processes_share_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "new" / "costs.json"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=write_many, args=(path, name)) for name in ("first", "second")]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    kept = read_costs(path)
    assert {"first19", "second19"} & set(kept)
    assert set(os.listdir(path.parent)) == {path.name}, "nothing temporary is left"
    write_costs(path, COSTS)
    assert read_costs(path) == {**kept, **COSTS}  # what others wrote stays


BAD_CACHES = {
    "cut off": '{"a": [0.001, 100], "b": [0.0',
    "empty": "",
    "other JSON": "[1, 2]",
    "deep": "[" * 100_000,
    "not text": b"\xff\xfe\x00\x01",
    "foreign entries": '{"a": 1, "b": {"seconds": 1}, "c": [1], "d": ["1", 2], "e": [true, 3], "f": null}',
    "not finite": '{"a": [NaN, 1], "b": [Infinity, 1], "c": [1, Infinity], "d": [1, 1.5]}',
    "negative": '{"a": [-1, 1], "b": [1, -1]}',
}


@pytest.mark.parametrize("name", BAD_CACHES)
def test_malformed_caches_are_measured_again(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "costs.json", BAD_CACHES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_costs(path) == {}
    write_costs(path, COSTS)
    assert read_costs(path) == COSTS


def test_sound_entries_of_a_foreign_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"version": 7, "a": [1e-3, 100]}))
    assert read_costs(path) == {"a": COSTS["a"]}


@contextmanager
def full_disk() -> Iterator[None]:
    """Refuses every write beyond the first 16 bytes of a file, as a disk does that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    write_costs(path, {"a": COSTS["a"]})
    with full_disk():
        write_costs(path, COSTS)
    assert read_costs(path) == {"a": COSTS["a"]}
    assert os.listdir(tmp_path) == [path.name]


def test_planning_without_a_place_for_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).train()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))  # a folder cannot be made below a file
    fxhybrid.compile(model, example_inputs=(X,), **OPTIONS)
    monkeypatch.setenv("XDG_CACHE_HOME", "beside")  # ignored, as the specification has it
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fxhybrid.compile(model, example_inputs=(X,), **OPTIONS)
    assert list((tmp_path / ".cache" / "fxhybrid").glob("profile-*.json"))
    assert not (tmp_path / "beside").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_kernel_library_that_is_cut_off_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = cpu._library(("g++",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fxhybrid").mkdir()
    whole = kept.read_bytes()
    broken = tmp_path / "fxhybrid" / kept.name
    broken.write_bytes(whole[: len(whole) // 2])
    assert cpu._library(("g++",)) == broken
    assert len(broken.read_bytes()) == len(whole)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return fxhybrid.plan(mlp().train(), (X,), **{**OPTIONS, "budget": 0.95})


def broken(text: str) -> Iterator[str]:
    """Plan files as disks and editors leave them."""
    for share in range(1, 10):
        yield text[: len(text) * share // 10]
    yield from ("", "null", "[]", "[" * 100_000, "\x00" * 64)
    raw = json.loads(text)
    for name in raw:
        yield json.dumps({key: value for key, value in raw.items() if key != name})
        wrong = [None, [], {}, True, "text", -1, float("nan"), float("inf")]
        for value in wrong:
            yield json.dumps({**raw, name: value})
    yield json.dumps({**raw, "more": 1})
    yield json.dumps({**raw, "actions": {"a": "explode"}})
    yield json.dumps({**raw, "actions": {"a": 1}})
    yield json.dumps({**raw, "gradient_error": {"value": "x", "source": "exact"}})


def test_broken_plan_files_are_refused_or_harmless(plan: Plan, tmp_path: Path) -> None:
    path, model = tmp_path / "plan.json", mlp().train()
    hybrid = fxhybrid.compile(model, example_inputs=(X,), **{**OPTIONS, "budget": 1 << 30})
    for text in broken(plan.to_json()):
        path.write_text(text, encoding="utf-8")
        try:
            found = Plan.load(path)
            hybrid.use_plan(found)
        except PlanMismatchError:
            continue
        assert str(found)  # a name or a figure that nobody computes with may be another one
        assert math.isfinite(found.gap)
        assert str(hybrid.report())
    hybrid.use_plan(plan)
    assert hybrid.plan.actions == plan.actions
    step(hybrid)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")
