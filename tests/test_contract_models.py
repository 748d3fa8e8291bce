"""Works unchanged, model by model: every bit as in eager, at the smallest budget, and the budget kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxhybrid import measure_step
from tests.compare import assert_same, state_of, tensors_of, tighten, total, twins
from tests.models import MODELS, Batch, make


def clear(model: nn.Module, batch: Batch) -> None:
    model.zero_grad()
    for t in tensors_of([batch.args, batch.kwargs]):
        t.grad = None


def call(m: nn.Module, batch: Batch) -> list[Any]:
    """The output, and the inputs as the model left them (it gets its own copies of those it may change)."""
    args, kwargs = pytree.tree_map(
        lambda t: t.clone() if isinstance(t, Tensor) and not t.requires_grad else t,
        (batch.args, batch.kwargs),
    )
    return [m(*args, **kwargs), tensors_of([args, kwargs])]


def input_grads(batch: Batch) -> list[Tensor | None]:
    return [t.grad for t in tensors_of([batch.args, batch.kwargs])]


RECOMPUTE_ONLY = ("mlp", "in_place", "batch_norms", "moving_average", "checkpointed", "writes_to_input")


@pytest.mark.parametrize(
    ("name", "compression"),
    [*((name, "lossless") for name in MODELS), *((name, "off") for name in RECOMPUTE_ONLY)],
)
def test_step_outside_loss(name: str, compression: str) -> None:
    """The user's own loop, unchanged: three steps with the loss outside, gradients and inputs' too."""
    model, batch = make(name)
    pair = twins(model, compression=compression)

    def step(m: nn.Module) -> list[Any]:
        clear(m, batch)
        output, inputs = call(m, batch)
        total(output).backward()
        return [output, *tensors_of(output), *inputs, *input_grads(batch)]

    pair.same(step)
    tighten(pair.hybrid)
    for seed in (1, 2):
        result = pair.same(step, seed=seed)
    plain = step(pair.plain)
    assert type(result[0]) is type(plain[0])
    assert pair.hybrid.plan.gradient_error.value == 0
    assert len(pair.hybrid.plans) == 1


@pytest.mark.parametrize("name", MODELS)
def test_step_traced_loss(name: str) -> None:
    """With the loss in the graph, the measured peak is at or under the smallest budget."""
    model, batch = make(name)
    pair = twins(model, loss_fn=total)
    clear(model, batch)
    torch.manual_seed(3)
    call(pair.hybrid, batch)[0].backward()
    budget = tighten(pair.hybrid)

    def step(m: nn.Module) -> list[Any]:
        clear(m, batch)
        loss, inputs = call(m, batch)
        loss = loss if m is pair.hybrid else total(loss)
        loss.backward()
        return [loss, *inputs, *input_grads(batch)]

    torch.manual_seed(3)
    step(pair.plain)
    assert_same(state_of(pair.plain), state_of(pair.hybrid))
    pair.same(step)
    del step

    def run() -> None:
        pair.hybrid(*batch.args, **batch.kwargs).backward()
        clear(pair.hybrid, batch)  # an input's gradient is no part of the measured base

    clear(pair.hybrid, batch)
    measured = measure_step(run, modules=pair.hybrid, tensors=[batch.args, batch.kwargs], repeats=0)
    assert measured.peak_bytes <= budget
    assert measured.stray_bytes == 0
