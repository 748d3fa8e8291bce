"""Cross entropy over many classes: the operators' results, the graphs, and a language model's peak."""

from __future__ import annotations

from functools import partial
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid import BudgetError, HybridModule
from fxhybrid.capture.capture import capture
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.step import Step
from fxhybrid.ir.plan import Tier
from fxhybrid.ops import sliced_loss
from fxhybrid.passes import loss_heads
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.loss_heads import multiply_by_slices
from fxhybrid.passes.prune_tangents import prune_tangents
from tests.compare import MARGIN, assert_same, state_of
from tests.graph_text import graph_text

aten, own = torch.ops.aten, torch.ops.fxhybrid
ROWS, CLASSES, WIDTH = 512, 4096, 32
LOGITS_BYTES = ROWS * CLASSES * 4  # 8 MiB


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes several slices of small tensors."""
    monkeypatch.setattr(sliced_loss, "SLICE_BYTES", 4000)
    monkeypatch.setattr(sliced_loss, "FEWEST_ROWS", 3)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("ignored", [-100, 0, 3])
@pytest.mark.parametrize("shape", [(50, 33), (7, 3001), (1, 5)])
def test_slices_give_the_bits_of_aten(shape: tuple[int, int], ignored: int, reduction: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 5 * torch.randn(shape, generator=generator)
    target = torch.randint(shape[1], shape[:1], generator=generator)
    target[1::4] = ignored
    log = torch.log_softmax(logits, 1)
    loss, weight = aten.nll_loss_forward(log, target, None, reduction, ignored)
    found = own.sliced_nll(logits, target, reduction, ignored)
    assert all(map(torch.equal, found, (loss, weight)))
    gradient = torch.randn(loss.shape, generator=generator)
    of_log = aten.nll_loss_backward(gradient, log, target, None, reduction, ignored, weight)
    expected = aten._log_softmax_backward_data(of_log, log, 1, torch.float32)
    common = gradient, logits, target, reduction, ignored, weight
    assert torch.equal(own.sliced_nll_backward(*common), expected)

    layer, hidden = (torch.randn(n, 8, generator=generator) for n in (shape[1], shape[0]))
    products = own.sliced_nll_products(*common, layer, hidden, True)
    wanted = expected @ layer, expected.t() @ hidden, expected.sum(0, keepdim=True)
    for one, other in zip(products, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Words(nn.Module):
    """Predicts each next word; returns loss and logits, as models of Hugging Face do."""

    def __init__(self, n_words: int = CLASSES, width: int = WIDTH, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.hidden = nn.Embedding(n_words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, n_words, bias=bias)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(F.gelu(self.hidden(self.words(ids))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def joint_of(model: nn.Module, *inputs: Tensor) -> JointGraph:
    return capture(Step(model, None, False), (inputs, {}, ())).joint


def lines(graph: JointGraph, *names: str) -> str:
    """The lines that call operators of these names."""
    found = [line for line in graph_text(graph).splitlines() if any(f"= {name}(" in line for name in names)]
    return "\n".join(found)


def test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, labels = torch.arange(6), torch.arange(6)
    joint = joint_of(Words(9, 4), ids, labels)
    assert "sliced" not in graph_text(canonicalize(joint)), "few classes hold no peak"
    monkeypatch.setattr(loss_heads, "FEWEST_CLASSES", 0)
    before = canonicalize(joint)
    names = "fxhybrid.sliced_nll", "fxhybrid.sliced_nll_backward", "fxhybrid.sliced_nll_products", "_log_softmax", "mm"
    assert lines(before, *names) == dedent(
        """\
        F sliced_nll_default = fxhybrid.sliced_nll(addmm_1, primals_7, 1, -100)
        B sliced_nll_backward_default = fxhybrid.sliced_nll_backward(tangents_1, addmm_1, primals_7, 1, -100, getitem_1)
        B mm_1 = mm(t_3, gelu)
        B mm = mm(add, t_2)
        B mm_3 = mm(t_7, embedding)
        B mm_2 = mm(gelu_backward, t_6)"""
    )
    assert multiply_by_slices(before) is not before
    assert "products" not in graph_text(multiply_by_slices(before)), "the logits get a gradient of their own"
    after = multiply_by_slices(prune_tangents(before, frozenset([1])))
    assert lines(after, *names) == dedent(
        """\
        F sliced_nll_default = fxhybrid.sliced_nll(addmm_1, primals_7, 1, -100)
        B sliced_nll_products_default = fxhybrid.sliced_nll_products(tangents_1, addmm_1, primals_7, 1, -100, \
getitem_1, t_2, gelu, True)
        B mm_3 = mm(t_7, embedding)
        B mm_2 = mm(gelu_backward, t_6)"""
    )


IDS = torch.arange(ROWS) * 7 % CLASSES
LABELS = torch.arange(ROWS) * 13 % CLASSES


def step(model: nn.Module, n_rows: int = ROWS) -> Any:
    model.zero_grad()
    output = model(IDS[:n_rows], LABELS[:n_rows])
    output["loss"].backward()
    return output


def peak_bytes(model: nn.Module) -> int:
    run = lambda: (step(model), None)[1]  # noqa: E731 (drops the outputs)
    return fxhybrid.measure_step(run, modules=model, tensors=(IDS, LABELS), repeats=0).peak_bytes


def compiled(budget: Any, **options: Any) -> HybridModule:
    return fxhybrid.compile(Words(), budget=budget, solver="mps", example_inputs=(IDS, LABELS), **options)


def smallest(**options: Any) -> HybridModule:
    with pytest.raises(BudgetError) as caught:
        compiled(1, **options)
    return compiled(int(MARGIN * caught.value.minimum_bytes), **options)


def test_a_language_model_needs_little_beside_its_logits() -> None:
    eager = peak_bytes(Words())
    assert eager > 3 * LOGITS_BYTES  # log probabilities, their gradient, that of the logits
    hybrid = smallest(exact="reordered")
    assert peak_bytes(hybrid) == hybrid.plan.peak_bytes < 0.5 * eager
    assert hybrid.plan.exactness is Tier.REORDERED
    assert "with a loss head in slices gradients differ by" in hybrid.report().signatures[0].capture_check
    plain = Words()
    step(plain)
    step(hybrid)
    for (name, one), other in zip(plain.named_parameters(), hybrid.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_lossless_slices_keep_eagers_bits() -> None:
    eager, hybrid = Words(), smallest(compression="lossless")
    assert peak_bytes(hybrid) == hybrid.plan.peak_bytes < peak_bytes(eager) - 0.9 * LOGITS_BYTES
    assert hybrid.plan.exactness is Tier.LOSSLESS
    plain = Words()
    assert_same(state_of(plain, step(plain)), state_of(hybrid, step(hybrid)))


@pytest.mark.parametrize("options", [{"compression": "lossless"}, {"exact": "reordered"}])
def test_fewer_rows_take_less(options: dict[str, Any]) -> None:
    """A budget for the longest batch holds for shorter ones."""
    hybrid = compiled(1.0, dynamic={"ids": {0: ROWS}, "labels": {0: ROWS}}, **options)
    for n_rows in (ROWS, 400, 200, 300, 100):
        plain = Words()
        step(plain, n_rows)
        step(hybrid, n_rows)
        for (name, one), other in zip(plain.named_parameters(), hybrid.parameters(), strict=True):
            if "exact" in options:
                torch.testing.assert_close(other.grad, one.grad, msg=name)
            else:
                assert torch.equal(other.grad, one.grad), name
        inputs = IDS[:n_rows], LABELS[:n_rows]
        run = lambda n: (step(hybrid, n), None)[1]  # noqa: E731 (drops the outputs)
        measured = fxhybrid.measure_step(partial(run, n_rows), modules=hybrid, tensors=inputs, repeats=0).peak_bytes
        assert measured == hybrid.plan.peak_bytes
