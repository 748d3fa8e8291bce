"""Bad input: an error of the contract's classes that says what to do, and a model that is left as it was."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError, CaptureError, FxHybridError, InvalidArgument, Plan, PlanMismatchError
from fxhybrid.capture.capture import capture
from fxhybrid.capture.step import Step
from fxhybrid.options import OPTIONS as OPTIONS_OF_COMPILE
from fxhybrid.options import Options
from tests.compare import assert_same, state_of, total
from tests.models import BatchNorms, mlp, rows


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Requires that the block leaves state, gradients, flags, hooks, attributes and generator alone."""
    before, modules = state_of(model), facts(model)
    yield
    assert_same(before, state_of(model))
    assert facts(model) == modules


def facts(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, type(m), m.training, sorted(vars(m)), [len(getattr(m, h)) for h in hooks])
        for name, m in model.named_modules()
    ] + [(name, p.requires_grad, id(p), p._version) for name, p in model.named_parameters()]


def refused(error: type[Exception], match: str, model: nn.Module, *args: Any, **options: Any) -> Any:
    """Compiles for ``args`` and expects a refusal; the model stays, and still runs."""
    options = {"budget": 1.0, "solver": "mps", **options}
    with untouched(model), pytest.raises(error, match=match) as caught:
        fxhybrid.compile(model, example_inputs=args, **options)
    assert isinstance(caught.value, FxHybridError)
    assert len(str(caught.value)) > 40
    return caught.value


BUDGETS = [
    0,
    -1,
    -0.5,
    0.0,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
    "12 parsecs",
    "",
    "-5MiB",
    1.5,
    [1],
    "0MiB",
]


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_budgets(budget: Any) -> None:
    error = refused(InvalidArgument, "budget", mlp().train(), rows(), budget=budget)
    assert "512MiB" in str(error)


OPTIONS: list[dict[str, Any]] = [
    {"solver": "magic"},
    {"solver": object()},
    {"compression": "zip"},
    {"backend": "tpu"},
    {"max_grad_error": -1},
    {"max_grad_error": float("nan")},
    {"max_grad_error": True},
    {"reserve_bytes": -5},
    {"reserve_bytes": 0.5},
    {"loss_fn": 3},
    {"return_outputs": True},
    {"plan": "plan.json"},
    {"optimizer": "adam"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o)))
def test_options(options: dict[str, Any]) -> None:
    refused(InvalidArgument, next(iter(options)), mlp().train(), rows(), **options)


def test_compile_names_every_option_with_its_default() -> None:
    """``compile`` spells its options out for those who read or complete it; ``Options`` is where they are declared."""
    parameters = inspect.signature(fxhybrid.compile).parameters
    assert set(OPTIONS_OF_COMPILE) < set(parameters)
    defaults = {name: parameters[name].default for name in OPTIONS_OF_COMPILE if name != "budget"}
    assert defaults == {name: getattr(Options, name) for name in defaults}


def test_options_that_there_are_not() -> None:
    with pytest.raises(InvalidArgument, match="no option bugdet; there are budget, loss_fn"):
        fxhybrid.plan(mlp().train(), (rows(),), budget=1.0, bugdet=1)
    with pytest.raises(InvalidArgument, match="budgets="):
        fxhybrid.frontier(mlp().train(), (rows(),), budget=1.0)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if out.sum() > 0:  # the line that the error must name
            out = out * 2
        return out


def test_control_flow_on_values_names_the_line() -> None:
    model, x = Branching().train(), rows()
    with untouched(model), pytest.raises(CaptureError, match=r"test_contract_bad_input\.py") as caught:
        capture(Step(model, None, False), ((x,), {}, ()))
    assert "if out.sum() > 0" in str(caught.value)


class Breaking(nn.Module):
    """Breaks eager's own rule about in-place changes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).exp_().add_(1).sigmoid_().mul_(2)


def test_a_step_that_eager_cannot_run() -> None:
    refused(CaptureError, "in-?place", Breaking().train(), rows())


def test_sparse_gradients_and_lazy_modules() -> None:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 8)).train()
    refused(CaptureError, "sparse=False", model, torch.randint(20, (16,)))
    with pytest.raises(InvalidArgument, match="lazy"):
        fxhybrid.compile(nn.Sequential(nn.LazyLinear(8)).train(), budget=1.0, example_inputs=(rows(),))


def test_wrong_shapes() -> None:
    refused(CaptureError, "shape|size", mlp().train(), rows(8, 5))


def test_missing_arguments() -> None:
    refused(CaptureError, "argument", mlp().train())


LEAVES: list[Any] = [[np.zeros(3)], object(), {"a": {1, 2}}, 1j, b"raw", np.float32(2), lambda: 1]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: type(leaf).__name__)
def test_leaves(leaf: Any) -> None:
    refused(InvalidArgument, "argument", mlp().train(), leaf)
    model, x = mlp().train(), rows()
    with untouched(model), pytest.raises(InvalidArgument, match="loss_args"):
        fxhybrid.compile(model, budget=1.0, loss_fn=F.mse_loss)(x, loss_args=(leaf,))


def test_nothing_needs_a_gradient() -> None:
    refused(CaptureError, "gradient", mlp().train().requires_grad_(False), rows())
    refused(CaptureError, "gradient", nn.Sequential(nn.ReLU()).train(), rows())
    refused(CaptureError, "gradient", mlp().train(), rows(), loss_fn=lambda out: out.detach().sum())


def test_loss_is_no_scalar() -> None:
    refused(InvalidArgument, "scalar", mlp().train(), rows(), loss_fn=lambda out: out.sum(0))
    refused(InvalidArgument, "scalar", mlp().train(), rows(), loss_fn=lambda out: (out.sum(), 1))


def test_other_devices() -> None:
    refused(InvalidArgument, "meta", mlp().train(), rows().to("meta"))
    model = mlp().train()
    with pytest.raises(InvalidArgument, match="meta"):
        fxhybrid.compile(model, budget=1.0, loss_fn=F.mse_loss)(rows(), loss_args=(rows().to("meta"),))
    mixed = mlp().train()
    mixed[3].to("meta")
    with pytest.raises(InvalidArgument, match="several devices"):
        fxhybrid.compile(mixed, budget=1.0, example_inputs=(rows(),))
    with pytest.raises(FxHybridError, match="meta"):
        fxhybrid.compile(mlp().train().to("meta"), budget=1.0, example_inputs=(rows().to("meta"),))


@pytest.mark.parametrize("model", [None, 3, F.relu, nn.Linear], ids=["None", "number", "function", "class"])
def test_not_a_module(model: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"nn\.Module"):
        fxhybrid.compile(model, budget=1.0)


def test_compiling_twice() -> None:
    hybrid = fxhybrid.compile(mlp().train(), budget=1.0)
    with pytest.raises(InvalidArgument, match="compiled already"):
        fxhybrid.compile(hybrid, budget=1.0)


def test_evaluation_mode_and_kind_of_example_inputs() -> None:
    refused(InvalidArgument, "train", mlp().eval(), rows())
    model, x = mlp().train(), rows()
    with untouched(model), pytest.raises(InvalidArgument, match="tuple"):
        fxhybrid.compile(model, budget=1.0, example_inputs=x)  # type: ignore[arg-type]


def test_set_budget_keeps_the_old_one() -> None:
    x = rows()
    hybrid = fxhybrid.compile(mlp(0.1).train(), budget=1.0, example_inputs=(x,), solver="mps")
    before = hybrid.plan
    for bad in (0, "12 parsecs", None, 2.0):
        with pytest.raises(InvalidArgument, match="budget"):
            hybrid.set_budget(bad)  # type: ignore[arg-type]
    with pytest.raises(BudgetError):
        hybrid.set_budget(1000)
    assert hybrid.plan == before
    total(hybrid(x)).backward()
    with pytest.raises(InvalidArgument, match="first call"):
        fxhybrid.compile(mlp().train(), budget=1.0).set_budget(0.5)


@pytest.mark.parametrize("solver", ["mps", "auto"])
@pytest.mark.parametrize("build", [lambda: mlp(0.1), BatchNorms], ids=["mlp", "batch_norms"])
def test_a_budget_that_cannot_be_met(build: Callable[[], nn.Module], solver: str) -> None:
    """The error carries the numbers, and 1.02 times its minimum then works."""
    model = build().train()
    x = rows() if isinstance(model, nn.Sequential) else torch.randn(8, 3, 16, 16)
    plain = copy.deepcopy(model)
    error = refused(BudgetError, "cannot be met", model, x, budget=5000, solver=solver)
    assert error.budget_bytes == 5000 < error.minimum_lower_bound_bytes <= error.minimum_bytes
    assert error.holder
    assert str(error.minimum_bytes) in str(error)
    total(plain(x)).backward()
    hybrid = fxhybrid.compile(model, budget=int(1.02 * error.minimum_bytes), example_inputs=(x,), solver=solver)
    total(hybrid(x)).backward()
    assert hybrid.plan.peak_bytes <= 1.02 * error.minimum_bytes


def test_plan_files(tmp_path: Path) -> None:
    x, model = rows(), mlp(0.1).train()
    plan = fxhybrid.plan(model, (x,), budget=0.9, solver="mps")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    text = path.read_text()
    foreign = [
        "",
        "{}",
        "null",
        "[]",
        '{"format": 1}',
        "not json",
        text[: len(text) // 2],
        text.replace('"format": 1', '"format": 99'),
    ]
    for broken in foreign:
        path.write_text(broken)
        with pytest.raises(PlanMismatchError, match=r"fxhybrid\.plan"):
            Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(PlanMismatchError):
        Plan.load(path)
    other = Plan.from_json(text.replace('"torch": "2.', '"torch": "1.'))
    refused(PlanMismatchError, "made with", model, x, plan=other, budget=1 << 30)


def test_a_failing_first_call_leaves_the_model_usable() -> None:
    model = mlp().train()
    hybrid = fxhybrid.compile(model, budget=1.0, solver="mps")
    handle = model.register_full_backward_hook(lambda *_: None)  # cannot be planned
    x = rows()
    for _ in range(2):
        with untouched(model), pytest.raises(CaptureError):
            hybrid(x)
    handle.remove()
    total(model(x)).backward()
    model.zero_grad()
    hybrid.eval()
    assert hybrid(x).shape == x.shape
