"""The MPS frontier against the simulator, hand-made problems and an exhaustive oracle."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.errors import PlanError
from fxhybrid.ir.plan import RECOMPUTE, Action, Compress
from fxhybrid.ir.problem import CodecOption, Op, Problem, Tensor, without_codecs, without_recomputation
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import FrontierPoint, PlanFrontier, Status, plan_error
from fxhybrid.solvers.bounds import peak_lower_bound
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.mps.neighbourhood import Neighbourhood
from fxhybrid.solvers.mps.plan_state import PlanState
from fxhybrid.solvers.mps.problem_tables import FIRST_CODEC, RECOMPUTED, SAVED, ProblemTables
from fxhybrid.solvers.portfolio.extend_plans import ensure, frontier_plans
from fxhybrid.solvers.portfolio.known_plans import plans_of
from fxhybrid.solvers.portfolio.solvers import Portfolio
from tests.problems import choices, problems, random_actions, random_problem, small_problems

MAX_ERROR = 0.1


def half(size: int, seconds: float) -> CodecOption:
    return CodecOption("half", size // 2, seconds / 2, seconds / 2, size // 2, size, True)


def quarter(size: int, seconds: float, error: float) -> CodecOption:
    return CodecOption("q", size // 4, seconds / 2, seconds / 2, size // 4, size, False, error)


def two_layers(*, codecs: tuple[CodecOption, ...] = ()) -> Problem:
    """in -> a (100 B, 1 s) -> b (100 B, 9 s) -> loss (4 B); backward reads b, then a; gradients are 10 B.

    Keep-all: the peak is while the second backward op runs or the first one: 100 a + 100 b + 4 loss
    + 10 gradient = 214 B.
    """
    tensors = (
        Tensor("a", 100, codecs),
        Tensor("b", 100),
        Tensor("loss", 4),
        Tensor("grad_b", 10),
        Tensor("grad_a", 10),
    )
    forward = (
        Op("make_a", (), (0,), 1.0, 100),
        Op("make_b", (0,), (1,), 9.0, 100),
        Op("make_loss", (1,), (2,), 1.0, 4),
    )
    backward = (Op("back_b", (1,), (3,), 1.0, 10), Op("back_a", (0, 3), (4,), 1.0, 10))
    return Problem(tensors, forward, backward, (2,), (), (4,), resident_bytes=0)


def test_save_all_is_the_first_point_and_dropping_helps_nothing_that_forward_needs() -> None:
    # While make_b runs, a and b are both there: 200 B. With a dropped, back_b has b + loss + grad = 114 B and
    # back_a has a + loss + grad_b + grad_a = 124 B; so the peak is make_b's 200 B.
    frontier = build_frontier(two_layers(), max_error=0.0)
    assert [(point.peak_bytes, point.overhead_s) for point in frontier.points] == [(214, 0.0), (200, 1.0)]
    assert frontier.points[1].actions == {0: RECOMPUTE}
    assert frontier.point_for(213) == frontier.points[1]
    assert frontier.point_for(199) is None


def test_a_codec_whose_encoding_is_the_peak_is_not_used() -> None:
    # Encoding and decoding cost 0.5 s, running make_a again 1 s. But a is encoded after its last
    # read (make_b), while b is there: 100 a + 100 b + 25 = 225 B, above keep-all, so the codec gains nothing.
    problem = two_layers(codecs=(quarter(100, 0.5, 0.05),))
    assert [r.actions for r in build_frontier(problem, max_error=0.1).points] == [{}, {0: RECOMPUTE}]
    # Without recomputation nothing helps.
    assert len(build_frontier(without_recomputation(problem), max_error=0.1).points) == 1


def chain_with_wide_backward(error: float) -> Problem:
    """a (100 B) and b (100 B) wait through a backward op that needs 400 B: keep-all 600 B and the loss's 4 B.

    Recomputing a or b costs 8 s each; a codec to 25 B costs 1 s each.
    """
    tensors = (
        Tensor("a", 100, (quarter(100, 1.0, error),)),
        Tensor("b", 100, (quarter(100, 1.0, error),)),
        Tensor("loss", 4),
        Tensor("grad", 10),
        Tensor("end", 10),
    )
    forward = (
        Op("make_a", (), (0,), 8.0, 100),
        Op("make_b", (), (1,), 8.0, 100),
        Op("make_loss", (0, 1), (2,), 1.0, 4),
    )
    backward = (Op("wide", (), (3,), 1.0, 400), Op("narrow", (0, 1, 3), (4,), 1.0, 10))
    return Problem(tensors, forward, backward, (2,), (), (4,), resident_bytes=0)


def test_error_limit_decides_between_codec_and_recomputation() -> None:
    # Both encoded: 400 + 4 + 25 + 25 = 454 B for 2 s, error 0.05 * sqrt(2) = 0.0707.
    rich = build_frontier(chain_with_wide_backward(0.05), max_error=0.08)
    point = rich.point_for(454)
    assert point is not None
    assert (point.peak_bytes, point.overhead_s) == (454, 2.0)
    assert point.error == pytest.approx(0.05 * math.sqrt(2))
    # Error for one codec only: the other tensor is recomputed, 400 + 4 + 25 = 429 B for 9 s.
    scarce = build_frontier(chain_with_wide_backward(0.05), max_error=0.06)
    point = scarce.point_for(454)
    assert point is not None
    assert (point.peak_bytes, point.overhead_s, point.error) == (429, 9.0, 0.05)
    # Both recomputed: 404 B for 16 s.
    assert rich.points[-1].peak_bytes == 404
    assert rich.points[-1].overhead_s == 16.0


@pytest.mark.parametrize(("depth", "again"), [(0, {3}), (1, {2, 3}), (2, {1, 2, 3}), (12, {0, 1, 2, 3})])
def test_a_chain_is_recomputed_up_to_a_depth(depth: int, again: set[int]) -> None:
    """a -> b -> c -> d, all of them lossy: to recompute d takes exact sources, recomputed or kept from some op on."""
    waiting = tuple(Tensor(name, 100, (quarter(100, 0.1, 0.01),)) for name in "abcd")
    chain = tuple(Op(f"make_{t}", (t - 1,) if t else (), (t,), 1.0, 100) for t in range(4))
    tensors = (*waiting, Tensor("loss", 4), Tensor("grad", 10))
    forward = (*chain, Op("make_loss", (3,), (4,), 1.0, 4))
    problem = Problem(tensors, forward, (Op("back", (0, 1, 2, 3), (5,), 1.0, 10),), (4,), (), (5,), resident_bytes=0)
    base = PlanState(ProblemTables(problem))
    base.apply(dict.fromkeys(range(4), FIRST_CODEC))
    kept = {min(again) - 1: SAVED} if min(again) else {}
    assert Neighbourhood(base, MAX_ERROR).repair(3, RECOMPUTED, depth) == {**dict.fromkeys(again, RECOMPUTED), **kept}


def test_a_mask_is_kept_packed_when_its_source_turns_lossy() -> None:
    # x (320 B) is read by conv's backward, its mask (80 B, packed 10 B) by relu's. By default the mask is
    # made in the backward pass for free, which needs x exactly.
    pack = CodecOption("bitpack", 10, 0.01, 0.01, 10, 80, True)
    tensors = (
        Tensor("x", 320, (quarter(320, 0.2, 0.01),)),
        Tensor("mask", 80, (pack,)),
        Tensor("loss", 4),
        Tensor("grad", 10),
        Tensor("end", 10),
    )
    forward = (
        Op("make_x", (), (0,), 50.0, 320, recomputable=False),
        Op("make_mask", (0,), (1,), 0.1, 80),
        Op("make_loss", (0,), (2,), 1.0, 4),
    )
    backward = (
        Op("wide", (), (3,), 1.0, 500),
        Op("relu_back", (1, 3), (4,), 1.0, 10),
        Op("conv", (0, 4), (), 1.0, 0),
    )
    problem = Problem(tensors, forward, backward, (2,), (), (4,), resident_bytes=0)
    frontier = build_frontier(problem, max_error=0.1)
    # Keep-all: 320 x + 4 + 500 = 824 B. Packed: 80 + 10 + 4 + 500 = 594 B for 0.2 + 0.02 s.
    point = frontier.point_for(600)
    assert point is not None
    assert point.actions == {0: Compress("q"), 1: Compress("bitpack")}
    assert (frontier.points[0].peak_bytes, point.peak_bytes) == (824, 594)
    assert point.overhead_s == pytest.approx(0.22)


def check_frontier(problem: Problem, frontier: PlanFrontier, max_error: float) -> None:
    assert frontier.points[0].actions == {}
    for point in frontier.points:
        line = simulate_actions(problem, point.actions)
        assert (line.peak_bytes, line.overhead_s) == (point.peak_bytes, point.overhead_s)
        assert plan_error(problem, point.actions) == point.error <= max_error * (1 + 1e-6)
    for above, below in itertools.pairwise(frontier.points):
        assert above.peak_bytes > below.peak_bytes
        assert above.overhead_s <= below.overhead_s


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from((0.0, 0.05, 0.3)), st.booleans())
def test_points_are_what_they_say(problem: Problem, max_error: float, recompute: bool) -> None:
    offered = problem if recompute else without_recomputation(problem)
    frontier = build_frontier(offered, max_error=max_error)
    check_frontier(problem, frontier, max_error)
    assert frontier.point_for(frontier.points[0].peak_bytes) == frontier.points[0]
    assert frontier.point_for(1 << 60) == frontier.points[0]
    assert frontier.point_for(frontier.points[-1].peak_bytes) == frontier.points[-1]
    assert frontier.point_for(frontier.points[-1].peak_bytes - 1) is None
    for point in frontier.points if not recompute else ():
        for t, action in point.actions.items():
            assert action is not RECOMPUTE or problem.producer[t] in problem.deferrable


@settings(max_examples=10, deadline=None)
@given(problems())
def test_without_codecs_nothing_is_compressed(problem: Problem) -> None:
    frontier = build_frontier(without_codecs(problem), max_error=1.0)
    check_frontier(problem, frontier, 0.0)
    assert not any(isinstance(action, Compress) for point in frontier.points for action in point.actions.values())


@settings(max_examples=100, deadline=None)
@given(problems(fused=True), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_footprint_equals_simulation_however_it_came_there(problem: Problem, seeds: list[int]) -> None:
    base = PlanState(ProblemTables(problem))
    for seed in seeds:
        actions = random_actions(problem, seed)
        codes = base.tables.codes_of(actions)
        assert codes is not None
        cost, line = base.evaluate(codes), simulate_actions(problem, actions)
        assert cost is not None
        assert cost.peak_bytes == line.peak_bytes
        assert cost.overhead_s == pytest.approx(line.overhead_s, abs=1e-9)
        assert base.exact_overhead_s() == line.overhead_s
        assert cost.error2 == pytest.approx(plan_error(problem, base.actions()) ** 2)
        assert simulate_actions(problem, base.actions()).peak_bytes == line.peak_bytes


@settings(max_examples=50, deadline=None)
@given(problems(fused=True), st.integers(0, 2**32 - 1), st.data())
def test_a_move_taken_back_leaves_nothing_behind(problem: Problem, seed: int, data: st.DataObject) -> None:
    free = [t for t in problem.candidates if t not in problem.outputs]
    base, rnd = PlanState(ProblemTables(problem)), random.Random(seed)
    for t in data.draw(st.lists(st.sampled_from(free), max_size=6)) if free else ():
        code = rnd.choice((SAVED, RECOMPUTED, *range(FIRST_CODEC, FIRST_CODEC + len(problem.tensors[t].codecs))))
        before = (base.cost(), base.valid, base.codes.copy(), base.heights().tolist())
        effect = base.effect({t: code})
        assert (base.cost(), base.valid, base.codes, base.heights().tolist()) == before
        base.apply({t: code})
        assert (effect is not None) == base.valid
        if effect is not None and before[0].overhead_s > 0 and base.overhead_s > 0:  # below that it is cut off
            assert base.overhead_s - before[0].overhead_s == pytest.approx(effect[1], abs=1e-9 * problem.step_s)
        assert effect is None or base.error2 - before[0].error2 == pytest.approx(effect[2], abs=1e-12)
        base.undo()
        assert (base.cost(), base.valid, base.codes, base.heights().tolist()) == before
        base.apply({t: code})


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_no_plan_is_below_the_bound(problem: Problem, seed: int) -> None:
    bound, holder = peak_lower_bound(problem)
    assert holder
    assert simulate_actions(problem, {}).peak_bytes >= bound
    assert simulate_actions(problem, random_actions(problem, seed)).peak_bytes >= bound


@settings(max_examples=15, deadline=None)
@given(problems(), st.floats(0.0, 1.2))
def test_solver_keeps_the_budget(problem: Problem, part: float) -> None:
    budget = int(simulate_actions(problem, {}).peak_bytes * part)
    result = Portfolio("mps").solve(problem, budget, max_error=MAX_ERROR)
    assert simulate_actions(problem, result.actions).peak_bytes == result.peak_bytes
    fits = result.status in (Status.OPTIMAL, Status.FEASIBLE)
    assert fits == (result.peak_bytes <= budget)
    if result.status is Status.INFEASIBLE:
        assert budget < MinPeakSolver().solve(problem, max_error=MAX_ERROR).lower_bound_bytes
    if part >= 1.0:
        assert (result.status, result.actions, result.overhead_s) == (Status.OPTIMAL, {}, 0.0)


def test_same_input_same_frontier() -> None:
    for seed in range(3):
        first = build_frontier(random_problem(seed, 15), max_error=MAX_ERROR)
        again = build_frontier(random_problem(seed, 15), max_error=MAX_ERROR)
        assert first == again


def test_frontier_is_built_once_per_problem() -> None:
    problem = random_problem(3, 20)
    known = frontier_plans(problem, max_error=MAX_ERROR)
    for share in (0.9, 0.7):
        extended, _ = Portfolio("mps").extend(known, int(share * known.plans[0].point.peak_bytes))
        assert all(old is new for old, new in zip(known.plans, extended.plans, strict=False))
        known = extended


def all_plans(problem: Problem, max_error: float) -> list[tuple[int, float]]:
    """Peak and added seconds of every valid plan."""
    found: list[tuple[int, float]] = []
    for picked in itertools.product(*(choices(problem, t) for t in problem.candidates)):
        actions: dict[int, Action] = dict(zip(problem.candidates, picked, strict=True))
        if plan_error(problem, actions) > max_error:
            continue
        try:
            line = simulate_actions(problem, actions)
        except PlanError:
            continue
        found.append((line.peak_bytes, line.overhead_s))
    return found


def compare_with_oracle(count: int, max_candidates: int, first_seed: int) -> tuple[list[float], list[float]]:
    """Ratios of added time (plus 0.1 % of the step) at five budgets each, and of the smallest peaks."""
    times: list[float] = []
    peaks: list[float] = []
    for problem in small_problems(count, max_candidates, first_seed):
        plans = all_plans(problem, MAX_ERROR)
        frontier = build_frontier(problem, max_error=MAX_ERROR)
        smallest, top = min(peak for peak, _ in plans), frontier.points[0].peak_bytes
        peaks.append(frontier.points[-1].peak_bytes / smallest)
        for k in range(5):
            budget = smallest + (top - smallest) * k // 5
            point = frontier.point_for(budget)
            if point is not None and smallest < top:
                best = min(added for peak, added in plans if peak <= budget)
                floor = 1e-3 * problem.step_s
                times.append((point.overhead_s + floor) / (best + floor))
    return times, peaks


def test_close_to_the_oracle_on_small_problems() -> None:
    times, peaks = compare_with_oracle(40, 6, first_seed=1000)
    mean = math.exp(sum(map(math.log, times)) / len(times))
    assert mean <= 1.1
    assert sum(ratio <= 1.0 for ratio in peaks) >= 0.9 * len(peaks)
    assert max(peaks) <= 1.1


def test_a_point_that_the_simulator_refuses_is_forgotten_before_it_can_run() -> None:
    # keep-all peaks at 214 B and recomputing a at 200 B, for 1 s; a point that claims 100 B for keep-all is a lie
    problem = two_layers()
    frontier = build_frontier(problem, max_error=0.0)
    plans = plans_of(problem, (*frontier.points, FrontierPoint({}, 100, 0.0, 0.0)), max_error=0.0)
    assert plans.smallest.peak_bytes == 100
    plans = ensure(plans, 200)
    known = plans.cheapest(200)
    assert known is not None
    assert known.point == frontier.points[1]
    plans = ensure(plans, 199)
    assert plans.cheapest(199) is None
    assert plans.smallest.peak_bytes == 200
