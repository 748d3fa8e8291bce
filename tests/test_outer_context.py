"""What may run around a compiled module: torch.compile, checkpoints, transforms, wrappers; and what is refused."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fxhybrid
from fxhybrid import CaptureError, HybridModule, InvalidArgument
from fxhybrid.capture.outer_context import refuse_wrapper
from fxhybrid.compiler.pending_calls import pending_calls
from tests.compare import tighten, twins
from tests.models import WIDTH, mlp

Run = Callable[[nn.Module, Tensor], Tensor]
X = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"budget": 1.0, "solver": "mps", "compression": "lossless"}


class Outer(nn.Module):
    """A model with another one inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2).tanh()


@pytest.fixture(scope="module")
def planned() -> HybridModule:
    """A compiled model; dropout makes a wrong order of random numbers visible."""
    torch.manual_seed(0)
    hybrid = fxhybrid.compile(mlp(0.1).train(), example_inputs=(X,), **OPTIONS)
    tighten(hybrid)
    return hybrid


@pytest.fixture(scope="module")
def plain(planned: HybridModule) -> nn.Module:
    return copy.deepcopy(planned._fxhybrid_session.model)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor | None]:
    """Those of a step, with the loss first; the model is left without."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = run()
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def same(planned: nn.Module, run: Callable[[], Tensor], plain: nn.Module, expected: Callable[[], Tensor]) -> None:
    for ours, eager in zip(gradients(planned, run), gradients(plain, expected), strict=True):
        assert ours is not None
        assert torch.equal(ours, eager)
    assert not pending_calls()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_torch_compile(planned: HybridModule, plain: nn.Module, backend: str) -> None:
    # both the module itself and a model around it: the graph breaks at the planned step
    for ours, eager in ((planned, plain), (Outer(planned), Outer(plain))):
        compiled = torch.compile(ours, backend="aot_eager" if ours is not planned else backend)
        same(ours, lambda c=compiled: c(X).square().mean(), eager, lambda e=eager: e(X).square().mean())
    torch._dynamo.reset()


def test_torch_compile_of_one_graph_says_what_to_do(planned: HybridModule) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Drop fullgraph=True.*backend=\"fxhybrid\""):
        torch.compile(planned, backend="eager", fullgraph=True)(X)
    torch._dynamo.reset()
    with pytest.raises(InvalidArgument, match="before"):
        planned.compile()
    model = mlp().train()
    model.compile(backend="eager")  # that way out
    pair = twins(model)
    pair.same(lambda m: (loss := m(X).square().mean(), loss.backward())[0])


def test_dynamic_marks_and_modes_of_the_backend(plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    options = {**OPTIONS, "budget": 1 << 30}
    compiled = torch.compile(model, backend="fxhybrid", options=options)
    for n in (96, 64):  # dynamic from the first call on
        x = X[:n].clone()
        torch._dynamo.mark_dynamic(x, 0)
        same(model, lambda x=x: compiled(x).square().mean(), plain, lambda x=x: plain(x).square().mean())
    with pytest.raises(InvalidArgument, match=r"mode is 'max-autotune'.*leave it out"):
        torch.compile(model, backend="fxhybrid", mode="max-autotune")(X)
    with pytest.raises(InvalidArgument, match="512MiB"):
        torch.compile(model, backend="fxhybrid")(X)
    torch._dynamo.reset()


def test_the_backend_plans_a_module_of_several_graphs_as_a_whole() -> None:
    class Broken(nn.Module):
        """Dynamo by itself would leave a function to eager in which a graph ends within a loop."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([mlp(0.1), mlp(0.1)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                if not x.isfinite().all():
                    x = x.clamp(-1, 1)
            return x.square().mean()

    plain = Broken().train()
    model = copy.deepcopy(plain)

    def step(trained: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        trained.zero_grad()
        forward(X).backward()

    def peak_bytes(trained: nn.Module, forward: Callable[[Tensor], Tensor]) -> int:
        run = partial(step, trained, forward)
        return fxhybrid.measure_step(run, modules=trained, tensors=X, repeats=0).peak_bytes

    compiled: Any = torch.compile(model, backend="fxhybrid", options={**OPTIONS, "budget": "smallest"})
    same(model, lambda: compiled(X), plain, lambda: plain(X))
    assert peak_bytes(model, compiled) <= compiled.plan.budget_bytes <= 0.65 * peak_bytes(plain, plain)
    report = compiled.report()
    assert len(report.parts) == 3  # two end within the loop
    assert report.unplanned == ()
    compiled.set_budget(1.0)
    assert compiled.plan.added_s == 0
    again = copy.deepcopy(compiled)
    assert torch.equal(again.eval()(X), plain.eval()(X))
    assert again.hybrid is not compiled.hybrid


def test_marked_inputs_of_a_planned_call_keep_their_gradient(planned: HybridModule, plain: nn.Module) -> None:
    found = []
    for model in (planned, plain):
        x = X.clone().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        gradients(model, lambda model=model, x=x: model(x).square().mean())
        found.append(x.grad)
    assert torch.equal(*found)


def test_reentrant_checkpoint_around(planned: HybridModule, plain: nn.Module) -> None:
    def run(model: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        return checkpoint(model, checkpoint(model, x, use_reentrant=True), use_reentrant=True).square().mean()

    before = planned.plan.budget_bytes
    planned.set_budget(1 << 30)
    same(planned, lambda: run(planned), plain, lambda: run(plain))
    x = X.clone().requires_grad_()

    def step() -> None:
        planned.zero_grad()
        x.grad = None
        checkpoint(planned, x, use_reentrant=True).square().mean().backward()

    budget = tighten(planned)
    measured = fxhybrid.measure_step(step, modules=planned, tensors=x, repeats=0)
    assert measured.peak_bytes <= budget
    planned.zero_grad()
    planned.set_budget(before)


def test_other_checkpoint_around_is_refused(planned: HybridModule) -> None:
    with pytest.raises(CaptureError, match=r"use_reentrant=True.*inside the model"):
        checkpoint(planned, X.clone().requires_grad_(), use_reentrant=False)
    assert not pending_calls()

    class Inside(nn.Module):  # the third way out; the first two are in the tests around
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    twins(Inside().train()).same(lambda m: (loss := m(X).square().mean(), loss.backward())[0])


TRANSFORMS: dict[str, Callable[[nn.Module], object]] = {
    "vmap": lambda m: torch.func.vmap(m, randomness="different")(X[None]),
    "grad": lambda m: torch.func.grad(lambda x: m(x).sum())(X),
    "jvp": lambda m: torch.func.jvp(m, (X,), (X,)),
    "jacrev": lambda m: torch.func.jacrev(m)(X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_around_are_refused(planned: HybridModule, name: str) -> None:
    with pytest.raises(CaptureError, match=r"torch\.func transform.*inside the model's forward.*plain model"):
        TRANSFORMS[name](planned)


def test_ways_out_of_transforms(planned: HybridModule, plain: nn.Module) -> None:
    parameters = {name: p.detach().clone().requires_grad_() for name, p in planned.named_parameters()}
    torch.manual_seed(3)
    loss = functional_call(planned, parameters, (X,)).square().mean()
    found = torch.autograd.grad(loss, list(parameters.values()))
    expected = gradients(plain, lambda: plain(X).square().mean())
    assert all(torch.equal(a, b) for a, b in zip((loss, *found), expected, strict=True))
    with forward_ad.dual_level(), pytest.raises(CaptureError, match=r"forward-mode.*plain model"):
        planned(forward_ad.make_dual(X, X))

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(self.body)(x.reshape(4, -1, WIDTH))

    twins(Mapped().train()).same(lambda m: (loss := m(X).square().mean(), loss.backward())[0])


def test_tracers_around_are_refused(planned: HybridModule, plain: nn.Module) -> None:
    for trace in (lambda m: torch.jit.trace(m, X), lambda m: torch.export.export(m, (X,)), torch.fx.symbolic_trace):
        with pytest.raises(CaptureError, match=r"model\.eval\(\)"):
            trace(planned)
    planned.eval()
    try:
        assert torch.equal(torch.export.export(planned, (X,)).module()(X), copy.deepcopy(plain).eval()(X))
    finally:
        planned.train()


def test_copies_plan_for_themselves(planned: HybridModule, plain: nn.Module) -> None:
    saved = io.BytesIO()
    torch.save(planned, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(planned),
        "pickle": pickle.loads(pickle.dumps(planned)),
        "save": torch.load(saved, weights_only=False),
    }
    for name, twin in copies.items():
        assert isinstance(twin, HybridModule), name
        assert twin[0].weight is not planned[0].weight, name
        same(twin, lambda m=twin: m(X).square().mean(), plain, lambda: plain(X).square().mean())
    assert all(p.grad is None for p in planned.parameters())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_wrappers_for_several_processes(planned: HybridModule, plain: nn.Module) -> None:
    with pytest.raises(InvalidArgument, match=r"DistributedDataParallel\(fxhybrid\.compile"):
        fxhybrid.compile(DistributedDataParallel(mlp()), **OPTIONS)
    with pytest.raises(InvalidArgument, match="DataParallel"):
        refuse_wrapper(nn.DataParallel(mlp()))
    for wrap in (lambda m: fully_shard(m), lambda m: m):
        sharded = mlp().train()
        fully_shard(sharded[0])
        with pytest.raises(InvalidArgument, match="FSDP"):
            fxhybrid.compile(wrap(sharded), **OPTIONS)
    late = fxhybrid.compile(mlp().train(), **OPTIONS)
    fully_shard(late)
    with pytest.raises(InvalidArgument, match=r"DistributedDataParallel\(fxhybrid\.compile"):
        late(X)
    wrapped = DistributedDataParallel(planned)  # the right order
    same(planned, lambda: wrapped(X).square().mean(), plain, lambda: plain(X).square().mean())


def test_a_compiled_part_is_not_compiled_again(planned: HybridModule) -> None:
    with pytest.raises(InvalidArgument, match="submodule 'inner' is compiled already"):
        fxhybrid.compile(Outer(planned), **OPTIONS)


def test_forward_can_be_wrapped_as_trainers_do(planned: HybridModule, plain: nn.Module) -> None:
    assert type(planned).__name__ == "Sequential"
    assert inspect.signature(planned.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(planned).forward) == inspect.signature(nn.Sequential.forward)
    assert not hasattr(planned.forward, "__wrapped__"), "who unwraps must not arrive at the plain model"
    inner, calls = planned.forward, []

    def forward(x: Tensor) -> Tensor:
        calls.append(x)
        return inner(x) * 3

    planned.forward = forward
    try:
        assert "forward" not in vars(planned)  # shared with the model, whose own forward it would hide
        before = len(planned.plans)
        same(planned, lambda: planned(X).square().mean(), plain, lambda: (plain(X) * 3).square().mean())
        assert len(calls) == 1
        assert len(planned.plans) == before
    finally:
        del planned.forward
    same(planned, lambda: planned.forward(X).square().mean(), plain, lambda: plain(X).square().mean())
