"""The CTC loss inside a planned step: eager's bits, whatever form lengths and targets come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compare import same_at_both_budgets, twins

STEPS, BATCH, CLASSES = 12, 4, 6
N_LABELS = (4, 1, 4, 3)
TARGETS = torch.tensor([[1, 2, 2, 5], [3, 0, 0, 0], [4, 4, 4, 4], [1, 2, 3, 0]])
LENGTHS = torch.tensor(N_LABELS)
CONCATENATED = torch.cat([row[:n] for row, n in zip(TARGETS, N_LABELS, strict=True)])
FULL = torch.full((BATCH,), STEPS)


def ctc(log_probs: Tensor, *, full: Any = FULL, **options: Any) -> Tensor:
    return F.ctc_loss(log_probs, options.pop("targets", TARGETS), full, LENGTHS, **options)


# Four equal labels need three blanks between them: seven steps at least, so the loss over 6 steps is infinite.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": ctc,
    "sum": lambda h: ctc(h, reduction="sum"),
    "none": lambda h: ctc(h, reduction="none"),
    "infinite": lambda h: ctc(h[:6], full=torch.full((BATCH,), 6), zero_infinity=True),
    "concatenated targets": lambda h: ctc(h, targets=CONCATENATED),
    "last class is blank": lambda h: ctc(h, blank=CLASSES - 1, targets=TARGETS % 5),
    "one sequence": lambda h: F.ctc_loss(h[:, 0], TARGETS[0], torch.tensor(STEPS), torch.tensor(4)),
    "module": lambda h: nn.CTCLoss()(h, TARGETS, FULL, LENGTHS),
    "torch's own": lambda h: torch.ctc_loss(h, TARGETS, FULL, LENGTHS, 0, 1, False),
}


class Recognizer(nn.Module):
    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.linear(x).log_softmax(-1).transpose(0, 1)).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name: str) -> None:
    pair = twins(Recognizer(LOSSES[name]))

    def step(m: nn.Module) -> Tensor:
        m.zero_grad()
        loss: Tensor = m(torch.randn(BATCH, STEPS, 8))
        loss.backward()
        return loss

    same_at_both_budgets(pair, lambda: pair.same(step))


def test_the_table_is_counted() -> None:
    """The operator is measured with the longest targets that fit."""
    pair = twins(Recognizer(ctc), example_inputs=(torch.randn(BATCH, STEPS, 8),))
    problem = pair.hybrid.planning_problem
    (forward,) = (op for op in problem.forward if "ctc_loss" in op.name)
    # BATCH x STEPS rows of 2 x 4 + 1 floats
    assert forward.alloc_peak_bytes >= BATCH * STEPS * 9 * 4
