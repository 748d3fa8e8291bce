"""Schedule and timeline on hand-made problems whose bytes can be added up by eye."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fxhybrid.errors import PlanError, ProblemError
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Compress, parse_action
from fxhybrid.ir.problem import CodecOption, Fusion, Op, Problem, Tensor, check_problem
from fxhybrid.ir.schedule import Kind, lower
from fxhybrid.ir.simulator import describe_peak, simulate, simulate_actions

KB = 1024
LOSSY = CodecOption("rowwise4:64", 1 * KB, 2e-3, 3e-3, 1 * KB, 8 * KB, lossless=False, error=0.05)
LOSSLESS = CodecOption("bitpack", 2 * KB, 1e-3, 1e-3, 2 * KB, 8 * KB, lossless=True)


def chain() -> Problem:
    """x -> a -> b -> loss; the backward pass reads a and b. Each activation has 8 KB, gradients 8 KB."""
    tensors = (
        Tensor("a", 8 * KB, (LOSSY, LOSSLESS)),
        Tensor("b", 8 * KB, (LOSSY,)),
        Tensor("loss", 0),
        Tensor("grad_b", 8 * KB),
        Tensor("grad_a", 8 * KB),
        Tensor("grad_w", 4 * KB),
    )
    forward = (
        Op("make_a", (), (0,), 10e-3, 8 * KB),
        Op("make_b", (0,), (1,), 1e-3, 8 * KB),
        Op("make_loss", (1,), (2,), 1e-3, 0),
    )
    backward = (
        Op("grad_b", (1,), (3,), 1e-3, 8 * KB),
        Op("grad_a", (3, 0), (4,), 1e-3, 8 * KB),
        Op("grad_w", (4,), (5,), 1e-3, 4 * KB),
    )
    problem = Problem(tensors, forward, backward, (2,), (), (5,), 16 * KB)
    check_problem(problem)
    return problem


def test_keeping_everything() -> None:
    # peak at grad_a: 16 KB resident + a 8 + grad_b 8 + grad_a 8 = 40 KB; b died with grad_b, where
    # 16 + a 8 + b 8 + grad_b 8 = 40 KB stood as well, and the first of equals is named
    problem = chain()
    schedule = lower(problem, {})
    timeline = simulate(problem, schedule)
    assert timeline.peak_bytes == 40 * KB
    assert describe_peak(problem, schedule, timeline) == "backward grad_b"
    assert timeline.overhead_s == 0


def test_recomputing_b_costs_its_op_and_saves_nothing_at_its_own_use() -> None:
    # b comes back right before grad_b: 16 + a 8 + b 8 + grad_b 8 = 40 KB again, for 1 ms more
    timeline = simulate_actions(chain(), {1: RECOMPUTE})
    assert timeline.peak_bytes == 40 * KB
    assert timeline.overhead_s == pytest.approx(1e-3)


def test_compressing_a_lowers_the_first_peak_only() -> None:
    # at grad_b: 16 + encoded a 1 + b 8 + grad_b 8 = 33 KB
    # decode of a: 16 + encoded 1 + grad_b 8 + a 8 = 33 KB; at grad_a: 16 + a 8 + grad_b 8 + grad_a 8 = 40 KB
    schedule = lower(chain(), {0: Compress("rowwise4:64")})
    timeline = simulate(chain(), schedule)
    at = {(i.kind, i.op): int(b) for i, b in zip(schedule.instructions, timeline.during_bytes, strict=True)}
    assert at[Kind.DECODE, 0] == 33 * KB
    assert timeline.peak_bytes == 40 * KB
    assert timeline.overhead_s == pytest.approx(5e-3)


def test_order_of_instructions() -> None:
    # a is encoded after its last forward read (make_b) and decoded right before grad_a, not earlier
    schedule = lower(chain(), {0: Compress("bitpack"), 1: SAVE})
    kinds = [(i.kind.value, i.op) for i in schedule.instructions]
    assert kinds == [
        ("run", 0), ("run", 1), ("encode", 0), ("run", 2),
        ("run", 0), ("decode", 0), ("run", 1), ("run", 2),
    ]  # fmt: skip
    assert schedule.n_forward == 4


def test_recomputation_reads_exact_values_only() -> None:
    with pytest.raises(PlanError, match=r"needs 'a' exactly, but rowwise4:64 is lossy"):
        lower(chain(), {0: Compress("rowwise4:64"), 1: RECOMPUTE})
    # a lossless code will do: a is decoded for the rerun of make_b and stays for grad_a
    schedule = lower(chain(), {0: Compress("bitpack"), 1: RECOMPUTE})
    assert [i.kind.value for i in schedule.instructions[schedule.n_forward :]] == [
        "decode", "rerun", "run", "run", "run",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["save", "recompute", "compress(pool:2,2)"])
def test_actions_are_written_as_they_are_read(text: str) -> None:
    assert str(parse_action(text)) == text


@pytest.mark.parametrize("text", ["recompute again", "compress(x) again", "compress(x", "keep"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid Simple"):
        parse_action(text)


def test_unknown_codec_and_random_ops_are_refused() -> None:
    with pytest.raises(PlanError, match="does not offer codec 'sqrt4:64'"):
        lower(chain(), {0: Compress("sqrt4:64")})
    problem = chain()
    random = dataclasses.replace(problem.forward[1], recomputable=False, pinned=True)
    problem = dataclasses.replace(problem, forward=(problem.forward[0], random, problem.forward[2]))
    with pytest.raises(PlanError, match="must run once"):
        lower(problem, {1: RECOMPUTE})


def test_a_mask_that_only_backward_needs_is_free_to_defer() -> None:
    # mask = a > 0 only serves grad_a: by default it is made in the backward pass and nothing is added
    base = chain()
    tensors = (*base.tensors, Tensor("mask", 2 * KB, (dataclasses.replace(LOSSLESS, encoded_bytes=256),)))
    forward = (*base.forward[:1], Op("make_mask", (0,), (6,), 1e-3, 2 * KB), *base.forward[1:])
    backward = (base.backward[0], dataclasses.replace(base.backward[1], inputs=(3, 6)), base.backward[2])
    problem = dataclasses.replace(base, tensors=tensors, forward=forward, backward=backward)
    assert problem.deferrable == {1}
    assert lower(problem, {}).overhead_s == 0
    assert [i.kind.value for i in lower(problem, {}).instructions[3:]] == ["run", "rerun", "run", "run"]
    # kept as one bit, a itself can go: at grad_b 16 + 0.25 + b 8 + grad_b 8 = 32.25 KB
    # at grad_a: 16 + mask 2 + grad_b 8 + grad_a 8 = 34 KB
    assert simulate_actions(problem, {6: Compress("bitpack")}).peak_bytes == 34 * KB


def test_a_mask_that_is_not_kept_is_fused_into_its_reader() -> None:
    # as above, but grad_a has a form that reads a instead of the mask: nothing makes the mask then
    base = chain()
    tensors = (*base.tensors, Tensor("mask", 2 * KB))
    forward = (*base.forward[:1], Op("make_mask", (0,), (6,), 1e-3, 2 * KB), *base.forward[1:])
    applied = dataclasses.replace(base.backward[1], inputs=(3, 6), fusion=Fusion(1, 8 * KB))
    problem = dataclasses.replace(
        base, tensors=tensors, forward=forward, backward=(base.backward[0], applied, base.backward[2])
    )
    schedule = lower(problem, {})
    assert [i.kind.value for i in schedule.instructions[schedule.n_forward :]] == ["run", "fused", "run"]
    assert schedule.overhead_s == 0
    # kept, it costs the seconds of its own op: 1 ms
    assert lower(problem, {6: SAVE}).overhead_s == pytest.approx(1e-3)
    assert Problem.from_json(problem.to_json()) == problem


def test_outputs_and_mutations_live_as_long_as_their_holder() -> None:
    # a is held by the caller: dropping it is no option and it adds to everything else: 16 + 8 + 8 + 8 = 40 KB
    problem = dataclasses.replace(chain(), outputs=(0, 2))
    assert 0 not in problem.candidates
    assert simulate_actions(problem, {0: RECOMPUTE}).peak_bytes == 40 * KB
    # grad_w is a gradient: it lives to the end, which the value's death shows
    schedule = lower(problem, {})
    timeline = simulate(problem, schedule)
    last = [v for v, made in enumerate(schedule.values) if made.tensor == 5]
    assert timeline.death[last[0]] == len(schedule.instructions)


def test_json_round_trip() -> None:
    assert Problem.from_json(chain().to_json()) == chain()


def test_a_file_may_lack_fields_that_came_later() -> None:
    old = json.loads(chain().to_json())
    del old["tangent_bytes"]
    assert Problem.from_json(json.dumps(old)) == dataclasses.replace(chain(), tangent_bytes=0)
    del old["resident_bytes"]
    with pytest.raises(ProblemError, match="resident_bytes"):
        Problem.from_json(json.dumps(old))


def test_ops_that_every_plan_runs() -> None:
    # The caller holds the loss, made from b, made from a. A mask of a serves grad_a only, unless it is kept.
    base = chain()
    tensors = (*base.tensors, Tensor("mask", 2 * KB), Tensor("sign", 2 * KB))
    forward = (*base.forward, Op("make_sign", (0,), (7,), 1e-3, 0), Op("make_mask", (7,), (6,), 1e-3, 0))
    backward = (base.backward[0], dataclasses.replace(base.backward[1], inputs=(3, 6)), base.backward[2])
    problem = dataclasses.replace(base, tensors=tensors, forward=forward, backward=backward)
    assert problem.required_forward_ops() == {0, 1, 2}
    assert problem.required_forward_ops(kept=[7]) == {0, 1, 2, 3}
    assert problem.required_forward_ops(kept=[6]) == {0, 1, 2, 3, 4}
    assert problem.deferrable == {3, 4}
    pinned = dataclasses.replace(
        problem, forward=(*forward[:3], dataclasses.replace(forward[3], pinned=True), forward[4])
    )
    assert pinned.required_forward_ops() == {0, 1, 2, 3}


def test_a_cycle_is_named() -> None:
    # a is made from b, and b from a; grad_b and grad_a hang on both
    base = chain()
    problem = dataclasses.replace(base, forward=(dataclasses.replace(base.forward[0], inputs=(1,)), *base.forward[1:]))
    with pytest.raises(ProblemError, match=r"'make_a' reads 'b'.* in a cycle: make_a -> make_b -> make_a"):
        check_problem(problem)


def test_an_order_that_cannot_be_is_named() -> None:
    base = chain()
    swapped = dataclasses.replace(base, forward=(base.forward[1], base.forward[0], base.forward[2]))
    with pytest.raises(
        ProblemError, match="'make_b' reads 'a' before any op writes it: 'make_a', which makes it, must"
    ):
        check_problem(swapped)
    without = dataclasses.replace(base, forward=base.forward[1:])
    with pytest.raises(ProblemError, match="'make_b' reads 'a' before any op writes it: no op makes it"):
        check_problem(without)
