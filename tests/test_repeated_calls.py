"""A call that finds all as the one before it did runs the same graphs at once; any change is noticed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fxhybrid import HybridModule
from tests.pending_parts import batches, compiled, mlp


def step(model: nn.Module, inputs: list[Tensor], *, fresh: bool = True) -> Iterator[Tensor]:
    """Runs the model on each batch, then one backward pass; yields the gradients."""
    if fresh:
        model.zero_grad()
    sum((model(x).square().mean() for x in inputs), torch.zeros(())).backward()
    yield from (p.grad for p in model.parameters() if p.grad is not None)


def repeats(hybrid: HybridModule) -> object:
    """Returns what is known of the last call; None where the next one is looked at anew in any case."""
    return hybrid._fxhybrid_session._repeated


def test_every_change_is_noticed() -> None:
    first, second = batches(2)
    plain = mlp()
    hybrid = compiled(mlp(), first, "1GiB")

    def check(inputs: list[Tensor], *, fresh: bool = True) -> object:
        pairs = zip(step(plain, inputs, fresh=fresh), step(hybrid, inputs, fresh=fresh), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        return repeats(hybrid)

    assert all(check([first]) is not None for _ in range(10))
    known = repeats(hybrid)
    assert check([second]) is known  # the same call, on other data
    assert check([first], fresh=False) is None  # older gradients, to which new ones are added
    assert check([first, second]) is None  # the second call of a step
    assert check([first]) is not None
    for model in (plain, hybrid):
        next(model.parameters()).requires_grad_(False)
        model.zero_grad()
    frozen = [check([first]) for _ in range(10)][-1]
    assert frozen is not known  # another signature
    assert check([first]) is frozen
    hybrid.set_budget(hybrid.plan.peak_bytes)
    assert check([first]) is not frozen  # another budget
    assert check([first[:7]]) is not frozen  # another size
