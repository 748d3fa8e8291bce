"""Models that trace into several graphs only: eager's bits, one budget for the step, the report."""

from __future__ import annotations

import gc
import inspect
import random
import time
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import HybridModule, InvalidArgument
from fxhybrid.segments import graph_runner
from tests import several_graphs_parts
from tests.compare import MARGIN, twins
from tests.several_graphs_parts import WIDTH, Blocks, X, loss_of, peak_bytes, smallest, step


@pytest.mark.filterwarnings("error::UserWarning:fxhybrid")
def test_a_model_with_breaks_trains_like_the_same_without() -> None:
    pair = twins(Blocks().train(), example_inputs=(X,), loss_fn=loss_of)
    whole = fxhybrid.compile(
        Blocks(()).train(), budget=1.0, example_inputs=(X,), loss_fn=loss_of, solver="mps", compression="lossless"
    )
    hybrid = pair.hybrid
    report = hybrid.report()
    assert report.signatures[0].capture_check.startswith("bit-equal")
    assert [part.line.rpartition(":")[0] for part in report.parts[:3]] == [several_graphs_parts.__file__] * 3
    assert report.unplanned == ()
    assert "ends behind" in str(report)
    assert whole.plan.budget_bytes <= hybrid.plan.budget_bytes <= 1.1 * whole.plan.budget_bytes
    for budget in (hybrid.plan.budget_bytes, int(MARGIN * smallest(hybrid))):
        hybrid.set_budget(budget)
        pair.same(step)
        assert peak_bytes(hybrid) <= budget
    assert smallest(hybrid) <= 1.1 * smallest(whole)
    assert hybrid.check_error(X) == 0
    with pytest.raises(InvalidArgument, match="several graphs"):
        _ = hybrid.joint_graph


def test_layers_that_look_at_their_functions_run_in_a_loop_with_breaks() -> None:
    """Layers of transformers count the parameters of their own methods; Dynamo then asks for the method's identity."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def chunk(self, x: Tensor) -> Tensor:
            return self.inner(x).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.chunk(x) * len(inspect.signature(self.chunk).parameters)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for _, layer in enumerate(self.layers):
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    pair = twins(Layers().train(), example_inputs=(X,), loss_fn=loss_of)
    pair.same(step)
    assert len(pair.hybrid.report().parts) == 4


def test_lossy_codecs_keep_their_limit_over_all_graphs() -> None:
    hybrid = fxhybrid.compile(Blocks().train(), budget=1.0, example_inputs=(X,), loss_fn=loss_of, solver="mps")
    budget = int(MARGIN * smallest(hybrid))
    hybrid.set_budget(budget)
    assert peak_bytes(hybrid) <= budget
    assert 0 < hybrid.check_error(X) <= 0.1
    assert hybrid.plan.peak_bytes <= budget


OWN, RNG, OLD = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)
BETWEEN: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "boolean mask": lambda h, _: h[h.sum(1) > 0].square().mean(),
    "numbers": lambda h, _: (h[random.sample(range(4), 3)] * np.random.beta(1, 1)).square().mean(),  # noqa: NPY002
    "own generator": lambda h, own: (h * own.random()).square().mean(),
    "global generators": lambda h, _: (h * OWN.random() * RNG.random() * OLD.rand()).square().mean(),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_python_between_graphs(name: str) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 1)
            self.own = random.Random(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(BETWEEN[name](torch.tanh(self.first(x)), self.own).reshape(1, 1)).sum()

    pair = twins(Between().train(), budget="1MiB")

    def run(model: nn.Module) -> Any:
        random.seed(1)
        np.random.seed(pair.seed)  # noqa: NPY002
        OWN.seed(pair.seed)
        OLD.seed(pair.seed)
        RNG.bit_generator.state = np.random.default_rng(pair.seed).bit_generator.state
        model.zero_grad()
        loss = model(X)
        loss.backward()
        return loss

    for pair.seed in range(3):
        pair.same(run, seed=pair.seed)


def test_what_python_takes_between_graphs_counts() -> None:
    class Matched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            assert h.isfinite().all()
            with torch.no_grad():  # a graph that needs no gradient, and is not planned
                nearest = int(torch.cdist(h, h).sum(1).argmin())  # 256 x 256: eight times as large as h
            return self.last(h)[nearest].square().mean()

    pair = twins(Matched().train(), example_inputs=(X,))
    pair.same(lambda model: (model.zero_grad(), loss := model(X), loss.backward())[1])

    def run() -> None:
        pair.hybrid.zero_grad()
        pair.hybrid(X).backward()

    measured = fxhybrid.measure_step(run, modules=pair.hybrid, tensors=X, repeats=0).peak_bytes
    assert measured <= pair.hybrid.plan.budget_bytes <= 1.05 * measured


def test_gradients_of_outputs_die_at_their_last_use() -> None:
    class Narrow(nn.Module):
        """Its second graph returns something wide, whose gradient is read first, and then makes wider ones."""

        def __init__(self, *, is_split: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.is_split = nn.Linear(WIDTH, 4), is_split
            self.wider, self.wide = nn.Linear(4, 192 * WIDTH), nn.Linear(WIDTH, 64 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            h = h.clone() if self.is_split and not h.isfinite().all() else h
            wide = self.wide(self.wider(h).view(len(x), 192, WIDTH).sum(1))
            return wide if not self.is_split or h.isfinite().all() else wide.clone()

    budgets = []
    for is_split in (False, True):
        pair = twins(Narrow(is_split=is_split).train(), example_inputs=(X,), loss_fn=loss_of)
        pair.same(step)
        budgets.append(pair.hybrid.plan.budget_bytes)
        assert peak_bytes(pair.hybrid) <= budgets[-1] <= 1.02 * peak_bytes(pair.hybrid)
    assert budgets[1] <= 1.05 * budgets[0]


class Chain(Blocks):
    """Has no residual connections, and may hold something large of Python's through its second graph."""

    n_times = 0

    def forward(self, x: Tensor) -> Tensor:
        held = x.repeat(1, self.n_times) if self.n_times else None
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.breaks and not torch.isfinite(x).all():
                x = x.clamp(-1, 1)
            held = None if i == 3 else held
        return x


def test_what_python_holds_beside_graphs_counts_once() -> None:
    whole, split = (twins(Chain(breaks).train(), example_inputs=(X,), loss_fn=loss_of) for breaks in ((), (0, 2, 4)))
    assert split.hybrid.plan.budget_bytes == whole.hybrid.plan.budget_bytes
    split.same(step)
    large = Chain((0, 2, 4)).train()
    large.n_times = 64
    pair = twins(large, example_inputs=(X,), loss_fn=loss_of)
    for budget in (pair.hybrid.plan.budget_bytes, smallest(pair.hybrid)):
        pair.hybrid.set_budget(budget)
        pair.same(step)
        assert peak_bytes(pair.hybrid) <= budget <= 1.02 * peak_bytes(pair.hybrid)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x if x.isfinite().all() else x.clamp(-1, 1)).mul(self.weight).square().mean()


class Timed:
    def __enter__(self) -> None:
        self.began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.took_s = time.perf_counter() - self.began_s


class Looping(nn.Module):
    def __init__(self, around: Any) -> None:
        super().__init__()
        self.layers, self.around = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), around

    def forward(self, x: Tensor) -> Tensor:
        return self.timed(x) if self.around else self.looped(x)

    def timed(self, x: Tensor) -> Tensor:
        with self.around:
            return self.looped(x)

    def looped(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
            if not x.isfinite().all():
                x = x.clamp(-1, 1)
        return x.square().mean()


def test_loops_over_layers_are_split_and_functions_that_are_not_are_said() -> None:
    """Dynamo cannot go on within a context manager of one's own: it leaves that function to eager."""
    pair = twins(Looping(None), example_inputs=(X,))
    pair.same(lambda model: (model.zero_grad(), loss := model(X), loss.backward())[1])
    report = pair.hybrid.report()
    assert len(report.parts) == 3
    assert report.unplanned == ()
    assert pair.hybrid._fxhybrid_segments is not None
    segment = pair.hybrid._fxhybrid_segments.segments[0]
    for _ in range(3):  # layers that come and go: nothing is kept of those that are gone
        layer = [nn.Parameter(t.detach().clone()) if t is not X else t for t in segment.lifted.full((X,))]
        assert segment.twin_for(layer) is segment.twin_for(layer)
    assert len(segment.twins) == 1
    pair = twins(Looping(Timed()), example_inputs=(X,))
    pair.same(lambda model: (model.zero_grad(), loss := model(X), loss.backward())[1])
    left = pair.hybrid.report().unplanned
    assert [text.partition(":")[0] for text in left] == [f"Looping.timed ({__file__}"]


def test_a_graph_that_is_traced_again_is_the_same() -> None:
    """Dynamo's guards name the method of the dictionary that waits for its argument; the next call has another one."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            losses: dict[str, Tensor] = {}
            losses.update(self.parts(x))
            criterion = Weighted()  # whose buffer is new in each call
            return criterion(self.last(losses["sum"]))

        def parts(self, x: Tensor) -> dict[str, Tensor]:
            h = self.first(x).tanh()
            return {"sum": h if h.isfinite().all() else h.clamp(-1, 1)}

    pair = twins(Summed().train(), example_inputs=(X,))
    assert pair.hybrid._fxhybrid_segments is not None
    segments = pair.hybrid._fxhybrid_segments.segments
    n_segments = len(segments)
    for seed in range(2):
        pair.same(lambda model: (model.zero_grad(), loss := model(X), loss.backward())[1], seed=seed)
    assert len(segments) == n_segments


def test_too_many_traces_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_runner, "MOST_VARIANTS", 2)
    torch.compiler.reset()  # one limit is of all models together

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return h.square().sum() if h.isfinite().all() else h.sum()

    hybrid = fxhybrid.compile(Counted().train(), budget="1MiB", solver="mps", compression="lossless")
    for rows in (4, 5):
        hybrid(torch.ones(rows, 4)).backward()
    with pytest.raises(fxhybrid.CaptureError, match="traced 256 times"):
        hybrid(torch.ones(6, 4))


def test_numbers_that_loops_make_stay_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over NumPy's numbers would be traced anew at each turn, as soon as one of them decides a branch."""
    monkeypatch.setattr(graph_runner, "MOST_VARIANTS", 8)

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rows = nn.Linear(WIDTH, WIDTH), 8

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return h[:, torch.tensor(np.stack(self.chosen()))].square().mean()

        def chosen(self) -> list[np.ndarray]:
            found: list[list[int]] = [[] for _ in range(self.rows)]
            for i in range(self.rows):
                shuffled = np.random.permutation(self.rows)  # noqa: NPY002
                for k in range(self.rows):
                    if shuffled[k] != i and len(found[i]) < 2:
                        found[i].append(int(shuffled[k]))
            return [np.array(row) for row in found]

    pair = twins(Shuffled().train(), budget="1MiB")

    def run(model: nn.Module) -> Tensor:
        np.random.seed(1)  # noqa: NPY002
        model.zero_grad()
        loss: Tensor = model(X)
        loss.backward()
        return loss.detach()

    pair.same(run)
    assert pair.hybrid.report().unplanned == ()


def test_variables_of_the_function_that_compiled_are_let_go() -> None:
    """Why a model does not trace whole is kept, and an error's frames hold those that called them."""

    def compile_with_a_variable() -> tuple[HybridModule, ReferenceType[Tensor]]:
        variable = torch.ones(3)
        return fxhybrid.compile(Blocks().train(), budget=1.0, example_inputs=(X,), loss_fn=loss_of), ref(variable)

    hybrid, variable = compile_with_a_variable()
    step(hybrid)
    gc.collect()
    assert variable() is None
