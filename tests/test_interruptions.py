"""Steps that end early, never end, or run beside each other: the next one is right, and nothing is kept alive."""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import HybridModule, pipeline
from fxhybrid.accuracy import calibration
from fxhybrid.capture import capture
from fxhybrid.compiler import active_graphs, first_plan, planner
from fxhybrid.compiler.pending_calls import pending_calls
from fxhybrid.profiling import op_profiler
from tests.compare import assert_same, state_of, tighten, twins
from tests.models import WIDTH, mlp, rows

X = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"budget": 1.0, "solver": "mps", "compression": "lossless"}


class WithMemory(nn.Module):
    """Keeps statistics in a buffer and counts its calls in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), mlp(0.1))
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture(scope="module")
def planned() -> HybridModule:
    """A compiled model at its smallest budget."""
    torch.manual_seed(0)
    hybrid = fxhybrid.compile(WithMemory().train(), example_inputs=(X,), **OPTIONS)
    tighten(hybrid)
    return hybrid


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    """No call is pending before or after a test."""
    assert not pending_calls()
    yield
    assert not pending_calls()


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def train_once(model: nn.Module, x: Tensor = X) -> Tensor:
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss


def next_step_is_right(hybrid: HybridModule) -> None:
    """Compares a step with that of a plain copy in the same state, memory included."""
    plain = copy.deepcopy(hybrid._fxhybrid_session.model)
    states = []
    for model in (plain, hybrid):
        torch.manual_seed(7)
        states.append(state_of(model, train_once(model)))
    assert_same(*states)
    budget = hybrid.plan.budget_bytes
    hybrid.zero_grad()
    measured = fxhybrid.measure_step(lambda: train_once(hybrid), modules=hybrid, tensors=X, repeats=0)
    assert measured.peak_bytes <= budget
    hybrid.zero_grad()


def test_exception_in_the_loss(planned: HybridModule) -> None:
    with pytest.raises(ZeroDivisionError):
        planned(X).sum() / (1 // 0)
    next_step_is_right(planned)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if target.dtype is not torch.float32:
            raise ValueError("targets must be floats")
        return F.mse_loss(output, target)

    model = WithMemory().train()
    before = state_of(model)
    hybrid = fxhybrid.compile(model, loss_fn=loss_fn, **OPTIONS)
    with pytest.raises(fxhybrid.CaptureError, match="targets must be floats"):
        hybrid(X, loss_args=(X.long(),))
    assert_same(before, state_of(model))
    hybrid(X, loss_args=(X,)).backward()
    assert len(hybrid.plans) == 1


# Where each stage is interrupted: after some of its work was done.
STAGES: dict[str, tuple[Any, str]] = {
    "capture": (capture, "_tag_phases"),
    "profile": (op_profiler, "_time"),
    "check of the capture": (first_plan, "check_capture"),
    "calibration": (calibration, "_groups_at_4_bits"),
    "solve": (planner.PlanMaker, "__call__"),
    "rewrite": (pipeline, "rewrite"),
    "graphs": (active_graphs, "plan_bytes"),
}


def interrupt(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    """Presses Ctrl-C at the first call of a function, once its work is done."""
    original = getattr(place, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        monkeypatch.setattr(place, name, original)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(place, name, interrupted)


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_while_planning(stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if stage == "profile":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no operator is measured yet
    torch.manual_seed(0)
    model = WithMemory().train()
    before, attributes = state_of(model), dict(vars(model))
    options = {**OPTIONS, "compression": "auto"} if stage == "calibration" else OPTIONS
    hybrid = fxhybrid.compile(model, **options)
    interrupt(monkeypatch, *STAGES[stage])
    with pytest.raises(KeyboardInterrupt):
        hybrid(X)
    assert_same(before, state_of(model))
    assert vars(model) == attributes
    assert not torch.autograd.profiler._is_profiler_enabled
    assert not torch._C._autograd._profiler_enabled()
    if options is OPTIONS:
        next_step_is_right(hybrid)
    else:
        train_once(hybrid)
    assert len(hybrid.plans) == 1


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_interrupted_in_a_step(planned: HybridModule, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned.zero_grad()
    interrupt(monkeypatch, planned.forward_graph if half == "forward" else planned.backward_graph, "forward")
    with pytest.raises(KeyboardInterrupt):
        train_once(planned)
    next_step_is_right(planned)


def switch_and_train(hybrid: HybridModule) -> None:
    hybrid.set_budget(1.0)
    train_once(hybrid)


def test_interrupted_switch_of_the_budget(planned: HybridModule, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned.plan
    interrupt(monkeypatch, *STAGES["graphs"])
    with pytest.raises(KeyboardInterrupt):
        switch_and_train(planned)
    planned.set_budget(before.budget_bytes)
    assert planned.plan.peak_bytes == before.peak_bytes
    next_step_is_right(planned)


def test_a_backward_pass_that_never_comes(planned: HybridModule) -> None:
    gc.disable()  # memory must be given back at once, not when cycles are looked for
    try:
        out = planned(X)
        (call,) = pending_calls()
        held = [reference for reference, _ in call.held]
        assert sum(call.alive().values()) > X.nbytes
        dropped = weakref.ref(call)
        del out, call
        assert dropped() is None
        assert all(reference.expired() for reference in held)
    finally:
        gc.enable()
    next_step_is_right(planned)


def test_two_backward_passes(planned: HybridModule) -> None:
    plain = copy.deepcopy(planned._fxhybrid_session.model)
    states = []
    for model in (plain, planned):
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(X).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        states.append(state_of(model))
        del loss
    assert_same(*states)
    next_step_is_right(planned)


def in_threads(*runs: Callable[[], Any]) -> None:
    """Runs all at the same time, and raises what the first failing one raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(runs))

    def guarded(run: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            run()
        except BaseException as error:  # noqa: BLE001 (raised again below)
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_two_threads_train_two_modules() -> None:
    pairs = [twins(mlp().train()) for _ in range(2)]

    def train(model: nn.Module) -> None:
        for n in (96, 64, 96):
            train_once(model, X[:n])
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)

    in_threads(*(lambda model=pair.hybrid: train(model) for pair in pairs))
    for pair in pairs:
        train(pair.plain)
        assert_same(state_of(pair.plain), state_of(pair.hybrid))
        assert len(pair.hybrid.plans) == 2


def test_two_threads_use_one_module() -> None:
    # of two signatures, so that a thread would run the other one's graphs if they were not held apart
    pair = twins(mlp().train(), budget="1GiB")
    batches = [rows(96), rows(64)]
    expected = []
    for x in batches:
        loss = pair.plain(x).square().mean()
        expected.append(torch.autograd.grad(loss, list(pair.plain.parameters())))

    def repeat(i: int) -> None:
        for _ in range(20):
            loss = pair.hybrid(batches[i]).square().mean()
            found = torch.autograd.grad(loss, list(pair.hybrid.parameters()))
            assert all(torch.equal(a, b) for a, b in zip(found, expected[i], strict=True))

    in_threads(lambda: repeat(0), lambda: repeat(1))
    assert len(pair.hybrid.plans) == 2


# --- the garbage collector


@pytest.mark.parametrize("n_graphs", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_collector_is_left_as_it_was(frozen: bool, n_graphs: int) -> None:
    """While a call is planned older objects are frozen, unless the program froze some itself; also where that fails."""
    gc.freeze() if frozen else gc.unfreeze()
    during: list[int] = []

    def loss(y: Tensor) -> Tensor:
        during.append(gc.get_freeze_count())
        if len(during) > 1:
            raise KeyboardInterrupt
        return y.sum()

    def broken(y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return loss(y)

    hybrid = fxhybrid.compile(mlp(), budget=1.0, loss_fn=loss if n_graphs == 1 else broken)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            hybrid(rows(4))
    assert during[0] > 0
    assert (gc.get_freeze_count() > 0) == frozen
    assert gc.isenabled()
    gc.freeze()  # as it is before each test
