"""Paths through models of several graphs: new ones, several calls, functions and layers that they meet."""

from __future__ import annotations

import pathlib
import random
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError, CaptureError
from fxhybrid.profiling.allocator import memory_rise
from tests.compare import twins
from tests.pending_parts import joint_loss, settle
from tests.pending_parts import peak_bytes as pending_peak_bytes
from tests.several_graphs_parts import WIDTH, Blocks, X, loss_of, peak_bytes, smallest, step


@pytest.mark.parametrize(("share", "compression"), [(0.9, "auto"), (0.7, "lossless")])
def test_every_path_keeps_the_budget_from_its_first_step_on(share: float, compression: str) -> None:
    """Layer drop: a path that takes more than those before it is planned before it runs, or refused."""
    whole = fxhybrid.compile(Blocks(()).train(), budget=1.0, example_inputs=(X,), loss_fn=loss_of, solver="mps")
    budget = int(share * whole.plan.budget_bytes)
    options = {"budget": budget, "loss_fn": loss_of, "solver": "mps", "compression": compression}
    hybrid = fxhybrid.compile(Blocks((), 0.3).train(), example_inputs=(X,), **options)
    base = sum(t.untyped_storage().nbytes() for t in (*hybrid.parameters(), X))
    refused, peaks = 0, set()
    for seed in range(8):
        hybrid.zero_grad()
        torch.manual_seed(seed)
        try:
            rise = memory_rise(lambda: hybrid(X).backward()).peak_rise_bytes
        except BudgetError:
            refused += 1
            continue
        assert base + rise <= budget, seed
        peaks.add(base + rise)
    assert refused <= 1
    assert len(peaks) > 1  # of paths with more layers and with fewer
    assert "one by one" in hybrid.report().signatures[0].capture_check


def test_small_budgets_leave_room_to_trace_another_path() -> None:
    """Of a model so small that a step takes less than the generator's states that live while a graph is traced."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            for i in random.sample(range(4), 3):
                x = torch.tanh(self.layers[i](x))
            return self.last(x * random.uniform(0.5, 1.5))

    x = X[:16, :8].contiguous()
    random.seed(8)
    hybrid = fxhybrid.compile(Shuffled(), budget="smallest", example_inputs=(x,), loss_fn=loss_of)
    base = sum(t.nbytes for t in (*hybrid.parameters(), x))
    for seed in range(8):
        hybrid.zero_grad()
        random.seed(seed)
        rise = memory_rise(lambda: hybrid(x).backward()).peak_rise_bytes
        assert base + rise <= hybrid.plan.budget_bytes, seed


def test_small_budgets_leave_room_to_trace_beside_what_a_frame_was_given() -> None:
    """What a function was given lives while its graph is traced, also what the graph reads and what nobody reads."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(128))
            self.register_buffer("shift", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            values = [x, x * 0.5]
            values.append(values[-1] + self.scale)
            y = values[-1]
            values[-1] = y * 0.5 if (y + self.shift).mean().item() > 0 else y + 1
            return (values[-1] * self.scale).sum()

    x = torch.rand(2, 128)
    hybrid = fxhybrid.compile(Looking(), budget="smallest", example_inputs=(x,))
    base = sum(t.nbytes for t in (*hybrid.parameters(), *hybrid.buffers(), x))
    for shift in (0.0, 9.0, -9.0, 8.0, -8.0):  # each branch is traced again with its second value
        hybrid.zero_grad()
        hybrid.shift.fill_(shift)
        rise = memory_rise(lambda: hybrid(x).backward()).peak_rise_bytes
        assert base + rise <= hybrid.plan.budget_bytes, shift


def test_a_graph_is_not_traced_where_there_is_no_room_for_it() -> None:
    """Where Python holds more results than on the planned path: refused before the budget is exceeded."""

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(128))
            self.register_buffer("turns", torch.tensor(1))

        def forward(self, x: Tensor) -> Tensor:
            values = [x * self.scale]
            for i in range(int(self.turns)):
                values.append(torch.tanh(values[-1] * self.scale * float(i + 2)))
                if not torch.isfinite(values[-1]).all():
                    raise ValueError
            return sum(value.sum() for value in values)

    x = torch.rand(4, 128)
    hybrid = fxhybrid.compile(Turning(), budget="smallest", example_inputs=(x,))
    base = sum(t.nbytes for t in (*hybrid.parameters(), *hybrid.buffers(), x))
    hybrid(x).backward()
    hybrid.zero_grad()
    hybrid.turns.fill_(2)

    def refused() -> None:
        with pytest.raises(BudgetError, match="another path"):
            hybrid(x)

    assert base + memory_rise(refused).peak_rise_bytes <= hybrid.plan.budget_bytes


def test_new_paths_train_like_the_model() -> None:
    pair = twins(Blocks((), 0.3).train(), loss_fn=loss_of, budget=1.0)
    for seed in range(4):
        pair.same(step, seed=seed)


def test_copies_that_undo_a_step_count() -> None:
    """A path that may be left again is begun with copies of the buffers at hand."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            h, rate = self.norm(torch.tanh(self.first(x))), np.random.beta(1, 1)  # noqa: NPY002
            h = h + torch.cat([h.detach()] * 8).mean()  # so that the peak is in the forward pass
            return self.last(rate * h + (1 - rate) * h.flip(0))

    whole = fxhybrid.compile(Drawn(), budget=1.0, example_inputs=(X,), loss_fn=loss_of)
    budget = smallest(whole) + 100  # the norm's buffers take more: 2 * 64 * 4 + 8
    hybrid = fxhybrid.compile(Drawn(), budget=budget, example_inputs=(X,), loss_fn=loss_of)
    with pytest.raises(BudgetError, match="another path"):  # the number becomes an input, and nothing can be undone
        deque((step(hybrid) for _ in range(2)), maxlen=0)
    for _ in range(2):
        assert peak_bytes(hybrid) <= budget


class Doubled(torch.autograd.Function):
    """Looks at files, so that it is not traced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: pathlib.Path) -> Tensor:
        path.exists()
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient, None


def test_custom_functions_between_graphs_are_refused_by_name() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Doubled.apply(self.first(x), pathlib.Path("."))).square().mean()

    with pytest.raises(CaptureError, match="the custom autograd function Doubled runs in Python between the graphs"):
        fxhybrid.compile(Custom(), budget=1.0, example_inputs=(X,))


def test_calls_before_one_backward_pass_fit_together() -> None:
    """The first call is planned as if alone; what both need is named at once, and then the first leaves room."""
    inputs = [X, X.flip(0)]
    pair = twins(Blocks((2,)).train(), example_inputs=(X,))
    alone = pair.hybrid.plan.budget_bytes

    def run(model: nn.Module) -> Tensor:
        model.zero_grad()
        loss = joint_loss(model, inputs)
        loss.backward()
        return loss.detach()

    assert settle(lambda: run(pair.hybrid), [pair.hybrid]) == 1
    budget = pair.hybrid.plan.budget_bytes
    assert alone < budget < 1.2 * alone
    pair.same(run)

    def separate(order: int) -> None:
        pair.hybrid.zero_grad()
        for loss in [pair.hybrid(x).square().mean() for x in inputs][::order]:
            loss.backward()

    for step_of in (partial(run, pair.hybrid), partial(separate, 1), partial(separate, -1)):
        assert pending_peak_bytes(step_of, [pair.hybrid], inputs) <= budget


def test_layers_that_run_by_the_same_code_keep_their_own_parameters() -> None:
    """Nothing that Dynamo's guards look at tells the turns of the loop apart."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not torch.rand([]) < 0.25:
                    x = x + layer(x).tanh()
            return x

    pair = twins(Alike().train(), budget="1MiB", loss_fn=loss_of, example_inputs=(X,))
    for seed in range(3):
        pair.same(step, seed=seed)


class InPlace(nn.Module):
    """Changes its argument in place, in a graph or in Python between two, where it is told so."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between, self.first, self.last = between, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, writes: bool) -> Tensor:
        if writes and self.between:
            double(x)
        elif writes:
            F.dropout(x, inplace=True)
        h = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.last(h * x).sum()


@torch._dynamo.disable
def double(x: Tensor) -> None:
    x.mul_(2)


@pytest.mark.parametrize("between", [False, True], ids=["in a graph", "in Python"])
def test_planning_leaves_arguments_that_a_call_changes_in_place(between: bool) -> None:
    example = X.clone()
    pair = twins(InPlace(between), example_inputs=(example, True))
    assert torch.equal(example, X)
    for rows in (len(X), len(X) // 2, len(X) - 1):  # the latter two are planned when they are called
        arguments = []

        def once(model: nn.Module, rows: int = rows, arguments: list[Tensor] = arguments) -> None:
            x = X[:rows].clone()
            model.zero_grad()
            torch.manual_seed(rows)
            model(x, True).backward()
            arguments.append(x)

        pair.same(once)
        assert torch.equal(*arguments)
        assert not torch.equal(arguments[0], X[:rows])


def test_the_first_call_that_changes_an_argument_in_place_is_refused_behind_others() -> None:
    pair = twins(InPlace(between=True), budget="1MiB", example_inputs=(X, False))
    with pytest.raises(CaptureError, match=r"changes an argument in place, .*Pass the argument as it was again"):
        pair.hybrid(X.clone(), True)
    pair.same(lambda model: model(X.clone(), True).backward())
