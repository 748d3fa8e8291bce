"""A model for calls of many sizes, and its comparison with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid.compiler.signature_cache import SignatureCache
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.suite.small_models import CausalBlock

WORDS, LENGTH = 64, 64


class LanguageModel(nn.Module):
    """Predicts the next word of pieces of any length up to ``LENGTH``, through one block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, 32), nn.Parameter(torch.randn(LENGTH, 32) * 0.02)
        self.block, self.drop = CausalBlock(32, 4, is_packed=True), nn.Dropout(0.1)
        self.head = nn.Linear(32, WORDS)
        self.register_buffer("n_words", torch.zeros((), dtype=torch.long))

    def forward(self, ids: Tensor) -> Tensor:
        self.n_words += ids.numel()
        return self.head(self.block(self.drop(self.tokens(ids) + self.places[: ids.shape[1]])))


def words_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Compared:
    """A model within a budget beside itself in eager mode."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], budget: float, **options: str
    ) -> None:
        self.eager = copy.deepcopy(model)
        self.model = model
        self.loss = loss
        self.hybrid = fxhybrid.compile(model, budget=budget, loss_fn=loss, solver="mps", **options)

    @property
    def cache(self) -> SignatureCache:
        return self.hybrid._fxhybrid_session.cache

    @property
    def n_captures(self) -> int:
        return len(self.cache.captured) + len(self.cache.families)

    def check(self, x: Tensor, y: Tensor, *, exact: bool = True) -> None:
        """Runs one step of both; gradients, loss, buffers and generator are equal, and the budget is kept."""
        torch.manual_seed(1)
        loss = self.hybrid(x, loss_args=(y,))
        loss.backward()
        mine, rng = [p.grad for p in self.model.parameters()], torch.get_rng_state()
        torch.manual_seed(1)
        expected = self.loss(self.eager(x), y)
        expected.backward()
        theirs = [p.grad for p in self.eager.parameters()]
        assert torch.equal(rng, torch.get_rng_state())
        if exact:
            assert torch.equal(loss, expected)
            assert all(map(torch.equal, mine, theirs))
            assert all(map(torch.equal, self.model.buffers(), self.eager.buffers()))
        else:
            difference = sum((a - b).square().sum() for a, b in zip(mine, theirs, strict=True))
            assert float(difference / sum(b.square().sum() for b in theirs)) ** 0.5 < 0.1
        self.model.zero_grad(set_to_none=True)
        self.eager.zero_grad(set_to_none=True)

    def check_peak(self, x: Tensor, y: Tensor) -> None:
        """Measures one step: its peak is at most the predicted one, and within the budget."""
        buffers = [b.clone() for b in self.model.buffers()]

        def step() -> None:
            self.model.zero_grad(set_to_none=True)
            self.hybrid(x, loss_args=(y,)).backward()

        measured = measure_step(step, modules=self.model, tensors=(x, y), repeats=0).peak_bytes
        plan = self.hybrid.plan
        assert plan.peak_bytes - 64 <= measured <= plan.peak_bytes <= plan.budget_bytes  # numbers as tensors
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.model.zero_grad(set_to_none=True)


def words(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, WORDS, (batch, length)), torch.randint(0, WORDS, (batch, length))
