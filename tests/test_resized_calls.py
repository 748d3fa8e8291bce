"""Calls of many sizes: two captures at most for each kind, within the budget, with eager's very bits."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid.capture.step import StepCall
from fxhybrid.compiler import signature_cache, sized_costs
from fxhybrid.compiler.workspace_formula import WorkspaceFormula, follows_formula
from fxhybrid.passes.sized_halves import SharedGraphs
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.profiling.op_profiler import Call, measure_alloc_peaks
from tests.resized_parts import WORDS, Compared, LanguageModel, words, words_loss


@pytest.fixture(scope="module")
def lossless() -> Compared:
    torch.manual_seed(0)
    compared = Compared(LanguageModel(), words_loss, 0.85, compression="lossless")
    compared.check(*words(8, 56))
    return compared


@pytest.mark.parametrize("size", [(8, 40), (8, 63), (8, 17), (3, 50), (8, 5)])
def test_new_sizes_need_one_more_capture_in_all(lossless: Compared, size: tuple[int, int]) -> None:
    batch = words(*size)
    lossless.check(*batch)
    lossless.check_peak(*batch)
    assert lossless.n_captures == 2


def test_new_sizes_need_no_graph_of_their_own(lossless: Compared) -> None:
    for length in (41, 43):
        lossless.check(*words(8, length))
    session = lossless.hybrid._fxhybrid_session
    first, second = (signature.active().function.graphs for signature in session.signatures[:2])
    assert isinstance(first, SharedGraphs)
    assert isinstance(second, SharedGraphs)
    assert first.halves is second.halves
    states = [signature.state for signature in session.signatures[:2]]
    assert not any("module" in vars(state.prepared.joint) for state in states)
    batch = words(8, 43)
    call = StepCall(batch[:1], {}, batch[1:])
    family = session.cache.families[0]
    sizes = family.sizes_of(session.step, call)
    (shared, *choices), (alone, *expected) = (
        prepare(session.step, call, sizes) for prepare in (family._prepared_at, family._prepared_alone)
    )
    assert shared.problem == alone.problem
    assert choices == expected
    assert shared.fingerprint == alone.fingerprint
    assert [s.name for s in shared.layout.storages] == [s.name for s in alone.layout.storages]


def test_workspaces_between_measured_sizes_follow_a_formula(
    lossless: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (30, 34, 38, 46, 50):
        lossless.check(*words(8, length))
    measured: list[Call] = []

    def noted(calls: Iterable[Call]) -> dict[str, int]:
        measured.extend(calls)
        return measure_alloc_peaks(measured)

    monkeypatch.setattr(sized_costs, "measure_alloc_peaks", noted)
    batch = words(8, 44)
    lossless.check(*batch)
    lossless.check_peak(*batch)
    assert not any(follows_formula(call.target) for call in measured)


def test_a_formula_of_workspaces_is_confirmed_and_goes_no_further_than_measured() -> None:
    formula = WorkspaceFormula()
    for length in (10, 20, 30, 40):
        formula.note({"s0": length, "s1": 4}, 3 * length**2 + 8)
    assert formula.at({"s0": 25, "s1": 4}) is None  # three points make a parabola, one more confirms it
    formula.note({"s0": 50, "s1": 4}, 3 * 50**2 + 8)
    assert formula.at({"s0": 25, "s1": 4}) == 3 * 25**2 + 8
    assert formula.at({"s0": 51, "s1": 4}) is None
    assert formula.at({"s0": 25, "s1": 5}) is None
    formula.note({"s0": 44, "s1": 4}, 3 * 44**2 + 64)
    assert formula.at({"s0": 25, "s1": 4}) is None


def test_a_larger_size_than_planned_uses_other_known_plans(lossless: Compared) -> None:
    lossless.check(*words(8, 63))
    assert lossless.hybrid.plan.counts().get("recompute", 0) > 0  # 0.85 of the save-all peak at length 56
    lossless.check(*words(8, 17))
    assert not lossless.hybrid.plan.actions  # fits as it is


def test_older_gradients_count_at_every_size(lossless: Compared) -> None:
    x, y = words(8, 36)
    lossless.check(x, y)
    step = lambda: lossless.hybrid(x, loss_args=(y,)).backward()  # noqa: E731
    measured = measure_step(step, modules=lossless.model, tensors=(x, y), repeats=0).peak_bytes  # a warm-up's are left
    assert measured <= lossless.hybrid.plan.budget_bytes
    lossless.model.zero_grad(set_to_none=True)
    lossless.eager.load_state_dict(lossless.model.state_dict())  # the buffer counted more steps
    assert lossless.n_captures == 2


def test_sizes_0_and_1_are_kinds_of_their_own(lossless: Compared) -> None:
    before = lossless.n_captures
    lossless.check(*words(1, 20))
    assert lossless.n_captures == before + 1


def test_another_budget_holds_at_sizes_seen_before(lossless: Compared) -> None:
    lossless.check(*words(8, 50))
    before, old = lossless.n_captures, lossless.hybrid._fxhybrid_session.budget_bytes
    lossless.hybrid.set_budget(int(old * 1.1))
    lossless.check_peak(*words(8, 50))
    lossless.check_peak(*words(8, 40))
    assert lossless.hybrid.plan.budget_bytes == int(old * 1.1)
    assert lossless.n_captures == before
    lossless.hybrid.set_budget(old)


def test_signatures_called_longest_ago_are_dropped(lossless: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature_cache, "KEPT_OPS", 1)
    monkeypatch.setattr(signature_cache, "LEAST_KEPT", 2)
    for length in (30, 31, 32, 33):
        lossless.check(*words(8, length))
    assert len(lossless.cache.signatures) == len(lossless.cache.captured) + 2


def test_lossy_plans_keep_the_limit_and_the_budget_at_other_sizes() -> None:
    compared = Compared(LanguageModel(), words_loss, 0.68, compression="auto")
    compared.check(*words(8, 56), exact=False)
    for size in ((8, 55), (7, 56)):
        batch = words(*size)
        compared.check(*batch, exact=False)
        compared.check_peak(*batch)
        assert compared.hybrid.check_error(batch[0], loss_args=(batch[1],)) <= 0.1
    assert compared.n_captures == 2
    assert any("compress" in kind for plan in compared.hybrid.plans for kind in plan.counts())
    compared.hybrid.recalibrate(batch[0], loss_args=(batch[1],))  # its errors count for other sizes from now on
    compared.check(*words(8, 48), exact=False)
    assert compared.n_captures == 3  # with the recalibrated state


def test_a_convnet_over_batch_sizes() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 5))
    compared = Compared(model, F.cross_entropy, 0.8, compression="lossless")
    for batch in (24, 20, 17):
        x, y = torch.randn(batch, 3, 8, 8), torch.randint(0, 5, (batch,))
        compared.check(x, y)
        compared.check_peak(x, y)
    assert compared.n_captures == 2


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_interpolation_over_batch_sizes(mode: str) -> None:
    up = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(8, 4, 1))
    compared = Compared(up, F.cross_entropy, 1.0, compression="lossless")
    for n in (24, 20, 18):
        compared.check(torch.randn(n, 3, 8, 8), torch.randint(0, 4, (n, 12, 12)))
    assert compared.n_captures == 2


class Pairs(nn.Module):
    """Compares two pieces of text of any lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(WORDS, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        pieces = (self.layer(self.tokens(piece)).mean(1) for piece in (ids, others))
        return torch.cosine_similarity(*pieces)


def test_lengths_that_were_equal_by_chance_may_differ_later() -> None:
    model = Pairs()
    plain = copy.deepcopy(model)
    hybrid = fxhybrid.compile(model, budget=2**20, loss_fn=torch.sum, compression="lossless", solver="mps")
    for first, second in ((20, 20), (12, 12), (14, 9), (7, 15)):
        batch = words(8, first)[0], words(8, second)[0]
        hybrid(*batch).backward()
        plain(*batch).sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        model.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
    cache = hybrid._fxhybrid_session.cache
    assert (len(cache.captured), len(cache.families)) == (1, 2)


class Repeated(nn.Module):
    """Loops as often as its input is long: each length is another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = torch.tanh(self.layer(x))
        return x


def test_what_no_symbolic_trace_can_carry_is_captured_as_it_is() -> None:
    compared = Compared(Repeated(), lambda out, y: (out - y).square().mean(), 2**20, compression="lossless")
    for length in (2, 3, 4):
        x = torch.randn(4, length, 16)
        compared.check(x, torch.randn(4, length, 16))
    assert len(compared.cache.captured) == 3
    assert not compared.cache.families


class InnerLoss(LanguageModel):
    """Computes its own loss, as Hugging Face models do, and returns the logits besides."""

    def forward(self, ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(ids)
        return words_loss(logits, target), logits


def test_outputs_without_a_gradient_are_expected_at_other_sizes_too() -> None:
    model = InnerLoss()
    plain = copy.deepcopy(model)
    hybrid = fxhybrid.compile(model, budget=0.95, compression="lossless", solver="mps")
    cache = hybrid._fxhybrid_session.cache
    for length in (50, 40, 45, 30, 49):
        batch = words(8, length)
        for each in (hybrid, plain):
            torch.manual_seed(length)
            each(*batch)[0].backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        model.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
    assert len(cache.captured) + len(cache.families) == 2
