"""Planning runs the model; nothing that the model keeps in Python may show it."""

from __future__ import annotations

import copy
import importlib
import random
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid.capture.python_state import copied, unchanged_python_state
from fxhybrid.console import stage


class History:
    """A plain object that a model keeps its past in."""

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[float] = []


class Keeper(nn.Module):
    """Leaves something in every kind of place at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls: list[int] = []
        self.sums: dict[str, float] = {}
        self.seen: set[int] = set()
        self.window: deque[int] = deque(maxlen=3)
        self.history = History()
        self.memory: Tensor | None = None
        self.total = torch.zeros(4)  # not a registered buffer
        self.counts = np.zeros(2)
        self.own_random = random.Random(3)
        self.own_generator = torch.Generator().manual_seed(4)
        self.nested = [{"deep": [0]}]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(self.calls))
        self.sums["x"] = self.sums.get("x", 0.0) + 1.0
        self.seen.add(len(self.seen))
        self.window.append(len(self.calls))
        self.history.steps += 1
        self.history.losses.append(1.0)
        self.memory = x.detach()
        self.total += 1
        self.counts[0] += 1
        self.nested[0]["deep"].append(1)
        self.linear.extra = len(self.calls)  # type: ignore[assignment]
        random.random(), np.random.rand(), self.own_random.random()  # noqa: NPY002  (what models in the wild call)
        torch.rand(1, generator=self.own_generator)
        return torch.as_tensor(self.linear(x))


PLACES: dict[str, Callable[[Keeper], Any]] = {
    "list": lambda m: list(m.calls),
    "dict": lambda m: dict(m.sums),
    "set": lambda m: set(m.seen),
    "deque": lambda m: list(m.window),
    "object": lambda m: (m.history.steps, list(m.history.losses)),
    "replaced attribute": lambda m: m.memory,
    "tensor in place": lambda m: m.total.tolist(),
    "array": lambda m: m.counts.tolist(),
    "nested": lambda m: list(m.nested[0]["deep"]),
    "new attribute": lambda m: hasattr(m.linear, "extra"),
    "random": lambda m: random.getstate(),
    "numpy": lambda m: str(np.random.get_state()),  # noqa: NPY002
    "own random": lambda m: m.own_random.getstate(),
    "own generator": lambda m: m.own_generator.get_state().tolist(),
}


@pytest.mark.parametrize("place", PLACES)
def test_runs_leave_no_trace(place: str) -> None:
    model = Keeper()
    model(torch.randn(2, 4))
    before = PLACES[place](model)
    identities = {name: id(value) for name, value in vars(model).items()}
    with unchanged_python_state(model):
        model(torch.randn(2, 4))
        assert place == "replaced attribute" or PLACES[place](model) != before or place == "new attribute"
    after = PLACES[place](model)
    assert (after is before) if isinstance(before, Tensor) else (after == before)
    assert {name: id(value) for name, value in vars(model).items()} == identities


def test_what_a_hook_closes_over_is_restored() -> None:
    kept: list[Tensor] = []
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with unchanged_python_state(model):
        model(torch.randn(2, 4))
    assert not kept


def test_an_exception_restores_too() -> None:
    model = Keeper()
    with pytest.raises(AttributeError), unchanged_python_state(model):
        model("no tensor")
    assert model.calls == []


class Recurrent(nn.Module):
    """Carries the hidden states of one step, detached, to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(16, 8)
        self.memory: Tensor | None = None
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        before = torch.zeros_like(h) if self.memory is None else self.memory
        self.memory = h.detach()
        return torch.as_tensor(self.outer(torch.cat([h, before], 1)).square().mean())


def test_libraries_that_planning_imports_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    before = random.getstate()
    with stage("import"):
        importlib.import_module("rich.style")
        assert random.getstate() != before, "rich numbers its styles from a random number on"
    assert random.getstate() == before


@pytest.mark.parametrize("compression", ["lossless", "auto"])
def test_planning_leaves_the_model_as_it_was(compression: str) -> None:
    torch.manual_seed(1)
    plain = Recurrent()
    torch.manual_seed(1)
    model = Recurrent()
    batches = torch.randn(4, 16, 8)
    for net in (plain, model):
        net(batches[0])  # a memory is there from the start
    hybrid = fxhybrid.compile(model, budget=1.0, example_inputs=(batches[1],), compression=compression)
    assert plain.memory is not None
    assert model.memory is not None
    assert torch.equal(plain.memory, model.memory)
    for batch in batches[1:]:
        assert torch.equal(plain(batch), hybrid(batch))
        assert torch.equal(plain.memory, model.memory)
    hybrid.check_error(batches[0])
    assert torch.equal(plain.memory, model.memory)


class KeepsHistory(nn.Module):
    """Keeps a tensor that autograd has computed, and reads it in the next step."""

    def __init__(self, *, is_split: bool) -> None:
        super().__init__()
        self.first, self.last, self.is_split = nn.Linear(4, 4), nn.Linear(4, 4), is_split
        self.state: Tensor | None = None
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h if self.state is None else h + self.state.detach()
        if self.is_split and not h.isfinite().all():
            h = h.clamp(-1, 1)
        self.state = self.last(h).tanh()
        self.log[:] = [h]
        return self.state.square().mean()


@pytest.mark.parametrize("is_split", [False, True])
def test_tensors_with_a_history_are_kept_from_step_to_step(is_split: bool) -> None:
    def step(model: Any) -> Tensor:
        model.zero_grad()
        loss: Tensor = model(x)
        loss.backward()
        return loss

    torch.manual_seed(0)
    x, plain = torch.randn(8, 4), KeepsHistory(is_split=is_split)
    step(plain)  # whose graph is gone
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(plain)
    model: Any = copied(plain)
    assert torch.equal(model.state, plain.state)
    model.state = model.state.requires_grad_() * 1
    model.state.sum().backward()
    hybrid: Any = fxhybrid.compile(model, budget=1.0, example_inputs=(x,), solver="mps", compression="lossless")
    for make in (lambda: hybrid, lambda: hybrid, lambda: copy.deepcopy(hybrid)):
        trained = make()
        torch.testing.assert_close(step(trained), step(plain), rtol=0, atol=0)
        assert torch.equal(trained.state, plain.state)
        assert torch.equal(trained.first.weight.grad, plain.first.weight.grad)
