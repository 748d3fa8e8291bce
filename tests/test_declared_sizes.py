"""Sizes declared by ``dynamic=``: the largest is planned first, and what fits no call is refused."""

from __future__ import annotations

import pytest

import fxhybrid
from tests.resized_parts import LanguageModel, words, words_loss


def test_the_largest_declared_size_is_planned_first() -> None:
    model, batch = LanguageModel(), words(8, 20)
    options = {"loss_fn": words_loss, "compression": "lossless", "solver": "mps"}
    largest = fxhybrid.compile(
        model, budget=0.85, example_inputs=(batch[0],), loss_args=(batch[1],), dynamic={"ids": {1: 60}}, **options
    )
    assert len(largest.plans) == 2  # of lengths 60 and 20
    assert largest.plans[1].peak_bytes > largest.plans[0].peak_bytes
    budget = largest.plan.budget_bytes
    assert budget == int(0.85 * largest.report().signatures[1].save_all_bytes)
    assert "(8, 60) int64" in str(largest.report()).replace("\n", " ")
    for size in ((8, 60), (8, 33), (5, 60)):
        ids, target = words(*size)
        largest(ids, loss_args=(target,)).backward()
        assert largest.plan.peak_bytes <= budget
        model.zero_grad(set_to_none=True)
    with pytest.raises(fxhybrid.BudgetError):  # length 20 alone would fit
        fxhybrid.compile(
            model,
            budget=budget // 2,
            example_inputs=(batch[0],),
            loss_args=(batch[1],),
            dynamic={"ids": {1: 60}},
            **options,
        )


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"words": {1: 60}}, "ids, loss_args"),
        ({"ids": {2: 60}}, "whose shape is"),
        ({"ids": {1: 10}}, "at most 10"),
        ({"ids": 60}, "input_ids"),
    ],
)
def test_declarations_that_fit_no_call(dynamic: dict[str, dict[int, int]], message: str) -> None:
    ids, target = words(8, 20)
    with pytest.raises(fxhybrid.InvalidArgument, match=message):
        fxhybrid.compile(
            LanguageModel(), budget=1.0, example_inputs=(ids,), loss_args=(target,), loss_fn=words_loss, dynamic=dynamic
        )
