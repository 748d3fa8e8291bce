"""Parameters are updated in the backward pass: the optimizer's own bits, and no set of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxhybrid
from fxhybrid.errors import BackwardError, InvalidArgument
from fxhybrid.module import HybridModule

ROWS, CLASSES = 256, 8
Optimizer = torch.optim.Optimizer
Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


class Net(nn.Module):
    """Reads one weight twice, hands one gradient to two parameters, and recomputes what its last weight was in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.tied = nn.Linear(64, 64, bias=False)
        self.shift, self.other = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.ones(64))
        self.gate, self.last = nn.Parameter(torch.ones(64)), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = x + F.gelu(layer(x))
        x = self.tied(self.tied(x).tanh()) + self.shift + self.other
        return self.last(x.sigmoid() * self.gate)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(ROWS, 64), torch.randint(CLASSES, (ROWS,))


def compiled(model: nn.Module, optimizer: Optimizer, budget: fxhybrid.Budget = 0.8) -> HybridModule:
    x, y = batch(0)
    return fxhybrid.compile(
        model,
        budget=budget,
        example_inputs=(x,),
        loss_fn=F.cross_entropy,
        loss_args=(y,),
        compression="lossless",
        optimizer=optimizer,
        step_in_backward=True,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_states_are_those_of_the_optimizer(name: str) -> None:
    plain, model = net(), net()
    mine, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, plain))
    hybrid = compiled(model, mine)
    assert hybrid.plan.actions
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, theirs)]
    for step in range(3):
        x, y = batch(step)
        hybrid(x, loss_args=(y,)).backward()
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(plain(x), y).backward()
        for optimizer, scheduler in zip((mine, theirs), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    states = (o.state_dict()["state"] for o in (mine, theirs))
    torch.testing.assert_close(*states, rtol=0, atol=0)

    x, y = batch(0)

    def iteration() -> None:
        hybrid(x, loss_args=(y,)).backward()
        mine.step()

    found = fxhybrid.measure_step(iteration, modules=hybrid, tensors=(x, y), optimizer=mine, repeats=0)
    # Python numbers that an operator here and there makes a tensor of take 12 bytes for a moment
    assert hybrid.plan.peak_bytes - 64 <= found.peak_bytes <= hybrid.plan.budget_bytes


def test_gradients_count_while_they_live() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)), nn.Linear(64, CLASSES))
    make, (x, y) = OPTIMIZERS["adamw fused"], (t[:2] for t in batch(0))  # few activations
    peaks = []
    for step_in_backward in (False, True):
        hybrid = fxhybrid.compile(
            model,
            budget=1.0,
            example_inputs=(x,),
            loss_fn=F.cross_entropy,
            loss_args=(y,),
            optimizer=make(model.parameters()),
            step_in_backward=step_in_backward,
        )
        peaks.append(hybrid.plan.peak_bytes)
    sizes = [p.nbytes for p in model.parameters()]
    # a weight's gradient and that of its bias live at once instead of all
    assert peaks[0] - peaks[1] > sum(sizes) - 1.5 * max(sizes)


class ClippedSGD(torch.optim.SGD):
    """Clips all gradients by their norm."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        super().step()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: ClippedSGD(p, lr=0.1), "ClippedSGD gives other parameters .* a norm of all gradients"),
        (lambda p: torch.optim.LBFGS(p), "cannot be tried"),
    ],
    ids=["clipping", "closure"],
)
def test_optimizers_that_need_all_gradients_are_refused(make: Make, match: str) -> None:
    model = net()
    with pytest.raises(InvalidArgument, match=match):
        compiled(model, make(list(model.parameters())))


def test_options_that_contradict_it_are_refused() -> None:
    model = net()
    with pytest.raises(InvalidArgument, match="needs an optimizer"):
        fxhybrid.compile(model, budget=1.0, step_in_backward=True)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(InvalidArgument, match="left to add"):
        fxhybrid.compile(model, budget=1.0, step_in_backward=True, accumulate=True, optimizer=optimizer)


def test_what_cannot_be_updated_at_once_is_left_to_the_optimizer() -> None:
    plain, model = net(), net()
    mine, theirs = (OPTIMIZERS["adam"](m.parameters()) for m in (model, plain))
    hybrid = compiled(model, mine, "1GiB")
    for m in (model, plain):
        m.tied.weight.register_hook(lambda g: 0.5 * g)
        m.gate.grad = torch.ones(64)
    x, y = batch(1)
    hybrid(x, loss_args=(y,)).backward()
    F.cross_entropy(plain(x), y).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["gate", "tied.weight"]
    found = torch.autograd.grad(hybrid(x, loss_args=(y,)), [model.shift])
    assert found[0].shape == (64,)
    mine.step(), theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_gradients_from_elsewhere_are_an_error() -> None:
    model = net()
    hybrid = compiled(model, OPTIMIZERS["adam"](model.parameters()), "1GiB")
    x, y = batch(1)
    with pytest.raises(BackwardError, match="the other one is lost"):
        (hybrid(x, loss_args=(y,)) + model.last.weight.square().sum()).backward()
    model.zero_grad()
    first, second = hybrid(x, loss_args=(y,)), hybrid(x, loss_args=(y,))
    second.backward()
    with pytest.raises(BackwardError, match="updated parameters since this call"):
        first.backward()
