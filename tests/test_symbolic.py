"""Captures with symbolic sizes: made concrete, they are what a static capture of these sizes is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fxhybrid.capture.capture import capture
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.capture.symbolic import capture_symbolic
from fxhybrid.errors import CaptureError
from fxhybrid.passes.concretize import SymbolicGraph, concretize
from fxhybrid.passes.fingerprint import fingerprint
from fxhybrid.passes.storages import layout_of
from tests.compare import twins

MakeCall = Callable[[int, int], StepCall]  # of a batch size and a length


def words(batch: int, length: int) -> Tensor:
    return torch.randint(0, 50, (batch, length))


def bert() -> tuple[Step, MakeCall]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    step = Step(model, lambda output, labels: F.cross_entropy(output.logits, labels), False)
    return step, lambda n, length: StepCall((words(n, length),), {}, (torch.zeros(n, dtype=torch.long),))


def gpt2() -> tuple[Step, MakeCall]:
    config = transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    loss = lambda output, ids: F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # noqa: E731
    step = Step(transformers.GPT2LMHeadModel(config), loss, False)

    def make(n: int, length: int) -> StepCall:
        ids = words(n, length)
        return StepCall((ids,), {}, (ids.clone(),))

    return step, make


def convnet() -> tuple[Step, MakeCall]:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 4))
    step = Step(model, F.cross_entropy, False)
    return step, lambda n, _: StepCall((torch.randn(n, 3, 8, 8),), {}, (torch.zeros(n, dtype=torch.long),))


@pytest.mark.parametrize("make", [bert, gpt2, convnet])
def test_a_concretized_graph_is_the_static_one(make: Callable[[], tuple[Step, MakeCall]]) -> None:
    step, call = make()
    first = call(20, 12)
    dims = {0: frozenset([0, 1] if make is not convnet else [0]), 1: frozenset([0, 1] if make is gpt2 else [0])}
    symbolic = capture_symbolic(step, tuple(first), dims)
    graph = SymbolicGraph(symbolic.capture.joint)
    other = call(31, 9)
    assert symbolic.capture.holds(step, *other)
    sizes = symbolic.sizes(step, *other)
    assert sizes is not None
    concrete, static = graph.at(sizes), concretize(capture(step, tuple(other)).joint, {})
    concrete.module.graph.lint()
    assert fingerprint(concrete) == fingerprint(static)  # operators, arguments, shapes, strides, types, roles
    mine, theirs = layout_of(concrete), layout_of(static)
    assert [(s.name, s.size_bytes) for s in mine.storages] == [(s.name, s.size_bytes) for s in theirs.storages]
    assert [(o.inputs, o.outputs) for o in mine.backward] == [(o.inputs, o.outputs) for o in theirs.backward]


def test_alike_dimensions_are_one_symbol_as_long_as_they_are_equal() -> None:
    step, call = gpt2()
    dims = {0: frozenset([0, 1]), 1: frozenset([0, 1])}
    symbolic = capture_symbolic(step, tuple(call(20, 12)), dims, alike=dims)
    other = call(31, 9)
    assert symbolic.capture.holds(step, *other)
    assert sorted((symbolic.sizes(step, *other) or {}).values()) == [9, 31]
    assert not symbolic.capture.holds(step, *StepCall(other.args, {}, (words(31, 10),)))


def test_sizes_0_and_1_and_another_structure_do_not_hold() -> None:
    step, call = convnet()
    symbolic = capture_symbolic(step, tuple(call(20, 0)), {0: frozenset([0]), 1: frozenset([0])})
    assert not symbolic.capture.holds(step, *call(1, 0))
    one = StepCall((torch.randn(20, 3, 8, 8), torch.randn(2)), {}, ())
    assert symbolic.sizes(step, *one) is None
    with pytest.raises(KeyError):
        concretize(symbolic.capture.joint, {})


class Fractions(nn.Module):
    """Scales by a fraction of its size that takes several roundings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (x.shape[0] * 0.3 + x.shape[0] / 7)


class SizeOut(Fractions):
    """Returns its size."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return self.layer(x), x.shape[0]


@pytest.mark.parametrize(("model", "reason"), [(Fractions(), "fractions"), (SizeOut(), "returns a size")])
def test_what_a_concrete_graph_cannot_give_back_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture_symbolic(Step(model, None, False), ((torch.randn(6, 4),), {}, ()), {0: frozenset([0])})


class Centred(nn.Module):
    """Subtracts a running mean over rows, whose number follows from a number of elements that a gradient has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = x.transpose(1, 2)
        self.average = self.average.lerp(rows.detach().reshape(-1, 8).mean(0), 0.5)
        scaled = ((rows - self.average) * self.scale).contiguous()
        return [scaled, scaled[:, 0] * 2]


def test_numbers_of_tangents_belong_to_no_pass() -> None:
    """What a forward pass computes from sizes stays there, though it is recorded as one of a tangent's sizes."""
    pair = twins(Centred())

    def step(n_rows: int, model: nn.Module) -> list[Tensor]:
        outputs: list[Tensor] = model(torch.randn(n_rows, 8, 4))
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        return outputs

    for n_rows in (6, 5, 3):
        pair.same(partial(step, n_rows))
