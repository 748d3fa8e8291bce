"""Client selection: what every selector promises, and what sets each apart."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.selection.candidates import Candidate, Selection
from fxhybrid.federated.selection.strategies import SELECTORS, select_as_oort, select_by_utility, select_randomly

MIB = 1 << 20


def candidate(name: str, **changes: object) -> Candidate:
    """A client like every other: 100 examples, loss 1, half of the full step's memory, 1 s per step."""
    usual = Candidate(
        name,
        n_examples=100,
        mean_squared_loss=1.0,
        available_bytes=500 * MIB,
        smallest_plan_bytes=300 * MIB,
        full_bytes=1000 * MIB,
        predicted_step_s=1.0,
        predicted_round_s=30.0,
        last_seen_round=5,
        times_selected=1,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def candidates() -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        Candidate,
        client=st.just(""),
        n_examples=st.integers(0, 1000),
        mean_squared_loss=st.none() | st.floats(0, 100),
        available_bytes=st.integers(0, 2000),
        smallest_plan_bytes=st.integers(0, 1000),
        full_bytes=st.integers(1, 2000),
        predicted_step_s=st.floats(1e-3, 1e3) | st.just(math.inf),
        predicted_round_s=st.floats(1e-2, 1e4) | st.just(math.inf),
        last_seen_round=st.none() | st.integers(1, 20),
        times_selected=st.integers(0, 20),
    )
    return st.lists(one, max_size=12).map(lambda found: [replace(c, client=f"c{i}") for i, c in enumerate(found)])


@pytest.mark.parametrize("name", sorted(SELECTORS))
@given(pool=candidates(), count=st.integers(0, 8), round_index=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_selector(name: str, pool: list[Candidate], count: int, round_index: int, seed: int) -> None:
    selection = SELECTORS[name](pool, count, round_index=round_index, seed=seed)
    allowed = [c for c in pool if c.fits] if name == "utility" else pool
    assert len(set(selection.chosen)) == len(selection.chosen)
    assert set(selection.chosen) <= {c.client for c in allowed}
    # the repeat cap and exploration never leave a place empty that somebody could fill
    assert len(selection.chosen) == min(count, len(allowed))
    assert set(selection.factors) == {c.client for c in pool}
    for client, own in selection.factors.items():
        assert own["chosen"] == (client in selection.chosen)
        assert "score" in own
        assert "fits" in own
    # the same seed and round choose alike: a resumed run goes on as an unbroken one
    assert SELECTORS[name](pool, count, round_index=round_index, seed=seed) == selection
    json.dumps(selection.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_bad_calls_are_refused(name: str) -> None:
    pool = [candidate("a")]
    with pytest.raises(InvalidArgument, match="count"):
        SELECTORS[name](pool, -1, round_index=1)
    with pytest.raises(InvalidArgument, match="rounds count from 1"):
        SELECTORS[name](pool, 1, round_index=0)
    with pytest.raises(InvalidArgument, match="named once"):
        SELECTORS[name](pool * 2, 1, round_index=1)


def factor(selection: Selection, client: str, name: str) -> float:
    return selection.factors[client][name]


def test_utility_multiplies_data_memory_and_speed() -> None:
    pool = [
        candidate("a", mean_squared_loss=4.0, available_bytes=400 * MIB, predicted_step_s=1.0),
        candidate("b", mean_squared_loss=1.0, available_bytes=500 * MIB, predicted_step_s=1e-6),
    ]
    selection = select_by_utility(pool, 1, round_index=10)
    # a: data 1, memory 0.4, compute 1/2; b: data sqrt(1)/sqrt(4) = 1/2, memory 0.5, compute 1
    assert factor(selection, "a", "reward") == pytest.approx(0.2)
    assert factor(selection, "b", "reward") == pytest.approx(0.25)
    assert factor(selection, "a", "bonus") == pytest.approx(math.sqrt(0.1 * math.log(10) / 5))
    assert factor(selection, "a", "score") == pytest.approx(0.2 + math.sqrt(0.1 * math.log(10) / 5))


def test_ranks_ignore_the_unit_and_equal_values_share() -> None:
    pool = [candidate(name, predicted_step_s=s) for name, s in (("a", 1.0), ("b", 2.0), ("c", 2.0))]
    in_ms = [replace(c, predicted_step_s=1000 * c.predicted_step_s) for c in pool]
    first, second = (select_by_utility(p, 2, round_index=3) for p in (pool, in_ms))
    assert first == second
    # a is the fastest: rank 3 of 3; b and c share ranks 1 and 2
    assert [factor(first, c, "compute") for c in "abc"] == pytest.approx([1.0, 0.5, 0.5])


def test_who_has_nothing_left_to_teach_is_not_chosen_for_its_device() -> None:
    strong = [
        candidate(f"s{i}", mean_squared_loss=1e-4, available_bytes=1000 * MIB, predicted_step_s=0.1) for i in range(5)
    ]
    weak = [candidate(f"w{i}", mean_squared_loss=9.0, available_bytes=400 * MIB) for i in range(5)]
    selection = select_by_utility([*strong, *weak], 5, round_index=10)
    # strong: data 0.01 / 3; weak: data 1, memory 0.4, compute rank 0.3
    assert set(selection.chosen) == {f"w{i}" for i in range(5)}


def test_memory_counts_no_more_than_the_unmodified_step_can_use() -> None:
    pool = [candidate("a", available_bytes=1000 * MIB), candidate("b", available_bytes=9000 * MIB)]
    selection = select_by_utility(pool, 1, round_index=3)
    assert factor(selection, "a", "memory") == factor(selection, "b", "memory")
    assert factor(selection, "b", "available_share") == 1.0


def test_oort_penalises_the_slow_with_the_square() -> None:
    losses = (1.0, 4.0, 9.0, 16.0, 25.0)
    pool = [
        candidate(f"c{i}", mean_squared_loss=loss, predicted_round_s=40.0 if i == 4 else 10.0)
        for i, loss in enumerate(losses)
    ]
    selection = select_as_oort(pool, 2, round_index=9)
    # the 0.8 quantile of (10, 10, 10, 10, 40) stands at rank 3.2 of 0 to 4: 10 + 0.2 * 30 = 16; (16 / 40)^2 = 0.16
    assert factor(selection, "c4", "system") == pytest.approx(0.16)
    assert factor(selection, "c3", "system") == 1.0
    # 100 * sqrt(loss): 100 to 500, so c2 (300) is half-way
    assert factor(selection, "c2", "data") == pytest.approx(0.5)


def test_oort_and_random_do_not_look_at_memory_and_utility_does() -> None:
    pool = [candidate("small", available_bytes=10), candidate("large")]
    assert len(select_as_oort(pool, 2, round_index=3).chosen) == 2
    assert len(select_randomly(pool, 2, round_index=3).chosen) == 2
    assert select_by_utility(pool, 2, round_index=3).chosen == ("large",)


def test_the_unseen_are_explored_less_and_less() -> None:
    pool = [candidate(f"k{i}") for i in range(50)]
    pool += [candidate(f"n{i}", mean_squared_loss=None, last_seen_round=None, times_selected=0) for i in range(50)]
    new = [sum(c.startswith("n") for c in select_by_utility(pool, 20, round_index=r).chosen) for r in (1, 30, 500)]
    # 0.9 * 20 = 18; 0.9 * 0.98^29 * 20 = 10.02; never under 0.2 * 20 = 4
    assert new == [18, 10, 4]


def test_those_long_unseen_get_a_larger_bonus() -> None:
    pool = [candidate("recent", last_seen_round=90), candidate("forgotten", last_seen_round=2)]
    selection = select_by_utility(pool, 1, round_index=100)
    # same reward; bonuses sqrt(0.46 / 90) = 0.07 and sqrt(0.46 / 2) = 0.48: under the cut-off, so never drawn
    assert selection.chosen == ("forgotten",)


def test_cut_off_sampling_draws_around_the_last_winner() -> None:
    pool = [candidate(f"c{i}", last_seen_round=10) for i in range(10)]  # all alike: all within the cut-off
    drawn = Counter(c for r in range(1, 201) for c in select_by_utility(pool, 2, round_index=r).chosen)
    # 400 places over ten clients: 40 each, sd 5.7
    assert min(drawn.values()) > 40 - 4 * 5.7
    assert max(drawn.values()) < 40 + 4 * 5.7


def test_who_was_chosen_too_often_rests() -> None:
    pool = [candidate(f"c{i}", times_selected=1) for i in range(4)] + [
        candidate("star", mean_squared_loss=100.0, times_selected=9)
    ]
    selection = select_by_utility(pool, 2, round_index=20)
    # mean (4 + 9) / 5 = 2.6; 9 is over twice that
    assert factor(selection, "star", "rested") == 1.0
    assert "star" not in selection.chosen
    assert "star" in select_by_utility(pool, 5, round_index=20).chosen


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_examples": -1},
        {"full_bytes": 0},
        {"predicted_step_s": 0.0},
        {"predicted_round_s": math.nan},
        {"mean_squared_loss": math.nan},
        {"mean_squared_loss": -1.0},
        {"times_selected": -1},
    ],
)
def test_impossible_candidates_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        candidate("a", **wrong)
