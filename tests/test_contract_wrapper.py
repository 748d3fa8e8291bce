"""The compiled module is the model: class, attributes, hooks, copies, inspection."""

from __future__ import annotations

import gc
import inspect
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import HybridModule, InvalidArgument, Plan, PlanMismatchError
from fxhybrid.ir.plan import Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.solvers.base import SolveResult
from fxhybrid.solvers.ilp.solver import IlpSolver
from tests.compare import tight_twins, tighten, total, twins
from tests.models import WIDTH, mlp, rows


class Configured(nn.Module):
    """Has what users reach for: a config, methods, a documented forward."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": WIDTH}
        self.body = mlp(0.1)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        """Scales what the body gives."""
        out = self.body(x) * scale
        return out if shift is None else out + shift

    def features(self, x: Tensor) -> Tensor:
        return self.body[0](x)


@pytest.fixture(scope="module")
def configured() -> HybridModule:
    torch.manual_seed(0)
    return fxhybrid.compile(Configured().train(), budget=1.0, example_inputs=(rows(),), solver="mps")


def test_is_the_model(configured: HybridModule) -> None:
    assert isinstance(configured, Configured)
    assert isinstance(configured, HybridModule)
    assert configured.config == {"width": WIDTH}
    assert configured.features(rows()).shape == rows().shape
    assert str(inspect.signature(configured.forward)) == str(inspect.signature(Configured().forward))
    assert configured.forward.__doc__ == "Scales what the body gives."
    assert "body" in dict(configured.named_children())
    assert "Configured" in repr(configured)
    configured.note = "kept"
    assert configured._fxhybrid_session.model.note == "kept"


def test_parameters_are_shared() -> None:
    model = Configured().train()
    hybrid = fxhybrid.compile(model, budget=1.0, solver="mps")
    assert all(a is b for a, b in zip(model.parameters(), hybrid.parameters(), strict=True))
    with torch.no_grad():
        hybrid.body[0].weight.zero_()
    assert not model.body[0].weight.any()
    hybrid.eval()
    assert not model.training
    assert not model.body.training
    hybrid.train()
    x = rows()
    total(hybrid.forward(x)).backward()
    assert model.body[9].bias.grad is not None
    assert len(hybrid.plans) == 1


def test_graphs_and_report(configured: HybridModule) -> None:
    for graph in (configured.joint_graph, configured.forward_graph, configured.backward_graph):
        assert isinstance(graph, fx.GraphModule)
        graph.graph.lint()
    assert "predicted" in str(configured.plan)
    assert configured.plans[0] is configured.plan or configured.plans[0] == configured.plan
    assert str(configured.report())


def test_report_says_what_more_error_would_save() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())]
    hybrid = fxhybrid.compile(
        nn.Sequential(*layers), budget=0.8, example_inputs=(torch.randn(1024, 64),), solver="mps", max_grad_error=1e-6
    )
    assert hybrid.plan.gradient_error.value < 1e-6  # no codec is that precise
    assert hybrid.report().signatures[0].tolerance_value is None
    report = hybrid.report(more_error=0.2)
    price = report.signatures[0].tolerance_value
    assert price is not None
    assert price.saved_bytes > 64 * 1024  # a quarter of a layer's input: several are kept encoded then
    assert price.saved_s >= 0
    assert "0.2 more error" in str(report)


def test_attributes_that_do_not_exist(configured: HybridModule) -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = configured.nonsense
    assert not hasattr(configured, "loss_fn")


def test_hooks_run_once_a_call() -> None:
    calls = {"pre": 0, "post": 0, "inner": 0}
    model = mlp(0.1).train()
    x = rows()
    pair = twins(model, example_inputs=(x,))
    for m in (pair.plain, pair.hybrid):
        m.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        m.register_forward_hook(lambda _m, _args, out: out + 1)
        m[0].register_forward_hook(lambda _m, _args, out: out * 0.5)

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        total(out := m(x)).backward()
        return out

    pair.same(run)
    tighten(pair.hybrid)
    pair.hybrid.zero_grad()
    pair.plain.zero_grad()
    pair.same(run)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    pair.hybrid.register_forward_pre_hook(count("pre"))
    pair.hybrid.register_forward_hook(count("post"))
    pair.hybrid[3].register_forward_hook(count("inner"))
    pair.hybrid.set_budget(1 << 30)
    run(pair.hybrid)
    before = dict(calls)
    run(pair.hybrid)
    assert {name: calls[name] - before[name] for name in calls} == {"pre": 1, "post": 1, "inner": 1}


def test_gradient_hooks_on_parameters_and_outputs() -> None:
    x = rows()
    seen: list[Tensor] = []
    pair = tight_twins(mlp().train(), (x,))
    for m in (pair.plain, pair.hybrid):
        m[0].weight.register_hook(lambda g: g * 3)

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        out = m(x)
        out.register_hook(lambda g: seen.append(g.clone()))
        out.retain_grad()
        total(out).backward()
        return out

    pair.same(run)
    assert torch.equal(*seen)


def test_moving_to_another_dtype_makes_a_new_signature() -> None:
    x = rows()
    pair = twins(mlp().train(), example_inputs=(x,), budget="1GiB")
    for m in (pair.plain, pair.hybrid):
        m.double()

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        total(out := m(x.double())).backward()
        return out

    assert pair.same(run).dtype is torch.float64
    assert len(pair.hybrid.plans) == 2


def test_plans_are_carried_and_checked() -> None:
    x, model = rows(), mlp(0.1).train()
    first = fxhybrid.compile(model, budget=1.0, example_inputs=(x,), solver="mps", compression="lossless")
    tighten(first)
    plan = Plan.from_json(first.plan.to_json())
    assert plan == first.plan
    second = fxhybrid.compile(model, budget=1 << 30, example_inputs=(x,), compression="lossless", plan=plan)
    assert second.plan.peak_bytes <= plan.budget_bytes
    assert second.plan.actions == plan.actions
    for other, args in ((mlp(0.1, depth=2).train(), x), (model, rows(32)), (mlp(0.0).train(), x)):
        with pytest.raises(PlanMismatchError, match="plan"):
            fxhybrid.compile(other, budget=1 << 30, example_inputs=(args,), compression="lossless", plan=plan)


@pytest.mark.parametrize("codec", ["rowwise4:7", "channelwise:44", "of a later version"])
def test_plans_with_codecs_that_are_not_offered_are_refused(codec: str) -> None:
    x, model = rows(), mlp(0.1).train()
    plan = fxhybrid.plan(model, (x,), budget=0.9, compression="lossless", solver="mps")
    first = next(iter(plan.actions))
    other = replace(plan, actions={first: Compress(codec)})
    with pytest.raises(PlanMismatchError, match=f"{codec}.*plan again"):
        fxhybrid.compile(model, budget=1 << 30, example_inputs=(x,), compression="lossless", plan=other)
    hybrid = fxhybrid.compile(model, budget=1 << 30, example_inputs=(x,), compression="lossless")
    with pytest.raises(PlanMismatchError, match=f"{codec}.*plan again"):
        hybrid.use_plan(other)
    total(hybrid(x)).backward()


class OwnSolver:
    """A user's solver: the integer program, and what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[int, float] = {}  # budget in bytes -> added seconds of the answer

    def solve(self, problem: Problem, budget_bytes: int, *, max_error: float) -> SolveResult:
        result = IlpSolver().solve(problem, budget_bytes, max_error=max_error)
        self.asked[budget_bytes] = result.overhead_s
        return result


def test_a_solver_of_ones_own() -> None:
    solver, x = OwnSolver(), rows()
    hybrid = fxhybrid.compile(mlp(0.1).train(), budget=0.95, example_inputs=(x,), solver=solver, compression="off")
    for budget in (0.95, 0.9):
        hybrid.set_budget(budget)
        assert 0 < hybrid.plan.added_s <= solver.asked[hybrid.plan.budget_bytes]
        assert hybrid.plan.peak_bytes <= hybrid.plan.budget_bytes
    assert len(solver.asked) == 2
    total(hybrid(x)).backward()


def test_plan_without_wrapping() -> None:
    model = mlp(0.1).train()
    plan = fxhybrid.plan(
        model,
        {"input": rows()},
        budget=0.9,
        loss_fn=F.mse_loss,
        loss_args=(rows(),),
        solver="mps",
        compression="off",
    )
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.gradient_error.value == 0
    assert all(p.grad is None for p in model.parameters())


def test_check_error_leaves_everything_alone() -> None:
    x, target = rows(), rows()
    hybrid = fxhybrid.compile(
        mlp(0.1).train(),
        budget=1.0,
        example_inputs=(x,),
        loss_fn=F.mse_loss,
        loss_args=(target,),
        solver="mps",
    )
    tighten(hybrid)
    state = torch.get_rng_state()
    error = hybrid.check_error(rows(), loss_args=(rows(),))
    torch.set_rng_state(state)
    assert 0 <= error < 0.5
    assert all(p.grad is None for p in hybrid.parameters())
    with pytest.raises(InvalidArgument, match="loss_args"):
        fxhybrid.compile(mlp().train(), budget=1.0)(x, loss_args=(target,))


def test_nothing_is_kept_alive() -> None:
    x = rows()
    hybrid = fxhybrid.compile(mlp(0.1).train(), budget=1.0, example_inputs=(x,), solver="mps")
    out = hybrid(y := rows())
    total(out).backward()
    kept = [weakref.ref(t) for t in (x, y, out, hybrid[0].weight)]
    del x, y, out
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True, True, False]
    del hybrid
    gc.collect()
    assert kept[3]() is None


def test_the_same_tensor_twice_is_its_own_signature() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.body(a) + self.body(2 * b)

    pair = twins(Two().train(), budget="1GiB")
    x, y = rows(), rows()
    for args in ((x, x), (x, y), (y, y)):
        pair.same(lambda m, args=args: (m.zero_grad(), out := m(*args), total(out).backward())[1])
    assert len(pair.hybrid.plans) == 2
