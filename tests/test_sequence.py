"""The peak of a step of several parts, by hand."""

from __future__ import annotations

from dataclasses import replace

from fxhybrid.ir.joined_problem import join_parts
from fxhybrid.ir.part import DyingTangent, Headroom, Part, Source, part_timeline
from fxhybrid.ir.plan import RECOMPUTE, Compress
from fxhybrid.ir.problem import Op, Problem, check_problem
from fxhybrid.ir.program import Tensor as Storage
from fxhybrid.ir.sequence import PartSequence, Shared, Tail, sequence_peak
from fxhybrid.ir.simulator import simulate_actions


def test_parts_add_up() -> None:
    """Two parts, each one op forward and one backward; sizes in bytes.

    The first makes h (100) and stores s (40); the second takes h, which becomes t (100) there, and makes y (10), held.
    """

    def part(stored: int, out: int, tangent: int, gradient: int) -> Problem:
        tensors = (Storage("s", stored), Storage("out", out), Storage("g", gradient))
        forward = (Op("f", (), (0, 1), 1.0, 0),)
        backward = (Op("b", (0,), (2,), 1.0, 0),)
        return Problem(tensors, forward, backward, (), (1,), (2,), 0, tangent)

    first, second = part(40, 100, 100, 7), part(100, 10, 10, 100)
    shared = (Shared(100, maker=0, last=1), Shared(10, maker=1, last=2, held=True, is_root=True))
    parts = (
        Part(first, leaving={1: 0}),
        Part(second, arriving={0: 0}, leaving={1: 1}, input_gradients={2: frozenset({0})}),
    )
    sequence = PartSequence(parts, (1, 0), shared, 1000)
    peak = sequence_peak(sequence, [part_timeline(each, {}) for each in parts])
    # forward 1: 40 + 100; forward 2: 40 stored, h is t from here on (100), y 10
    assert peak.forward_bytes == (1140, 1150)
    # backward 2: s of both, y, its gradient, and the new gradient of h (100): 1000 + 40 + 100 + 10 + 10 + 100
    # backward 1: s 40, y and its gradient, which backward() holds, the gradient of h (100), and the new one (7)
    assert peak.backward_bytes == (1167, 1260)
    assert peak.headroom == (Headroom(120, 93), Headroom(110, 0))
    # a gradient that nothing reads dies when the half begins, unless the backward pass begins with it
    dying = replace(sequence, parts=(replace(parts[0], dying=(DyingTangent(0, 100, -1),)), parts[1]))
    peak = sequence_peak(dying, [part_timeline(each, {}) for each in dying.parts])
    assert peak.backward_bytes == (1067, 1260)
    # only the first part's result gets a gradient, and a new one of 70 bytes is made there: s 40, the gradient of h
    # (100), y 10, and h (100), which the second part keeps
    large = replace(sequence, parts=(replace(parts[0], problem=part(40, 100, 100, 70)), parts[1]))
    needs = [part_timeline(each, {}) for each in large.parts]
    assert sequence_peak(large, needs).peak_bytes == 1260
    assert sequence_peak(replace(large, partial=((0,),)), needs).peak_bytes == 1000 + 40 + 100 + 10 + 100 + 70
    joined = join_parts(dying)
    assert fxhybrid_peak(joined.problem) >= peak.peak_bytes
    # Python takes 200 more before the second part, which h is alive for: 1000 + 40 + 100 + 200; and 300 after it, when
    # both parts have stored theirs: 1000 + 40 + 100 + 10 + 300
    sequence = replace(sequence, parts=(parts[0], replace(parts[1], rise_bytes=200)), tail=Tail(rise_bytes=300))
    peak = sequence_peak(sequence, [part_timeline(each, {}) for each in parts])
    assert (peak.forward_bytes[1], peak.peak_bytes) == (1340, 1450)
    joined = join_parts(sequence)
    assert fxhybrid_peak(joined.problem) >= peak.peak_bytes
    assert joined.by_part({1: "a", 5: "b"})[0] == {0: "a"}  # type: ignore[dict-item]


def test_a_part_runs_again_for_a_later_one() -> None:
    """Three parts in a row; the second one takes a (100) and makes h (60), the third takes h. Sizes in bytes.

    Each one keeps what it takes for its backward half, and h can be made again from a, which takes 80 and 3 seconds.
    """

    def part(taken: int, out: int, gradient: int, tangent: int) -> Problem:
        tensors = (Storage("taken", taken), Storage("out", out), Storage("g", gradient))
        forward = (Op("hand on", (), (0,), 0.0, 0, recomputable=False), Op("f", (0,), (1,), 1.0, 0))
        return Problem(tensors, forward, (Op("b", (0,), (2,), 1.0, 0),), (), (0, 1), (2,), 0, tangent)

    shared = (Shared(100, 0, 1), Shared(60, 1, 2), Shared(10, 2, 3, held=True, is_root=True))
    source = Source(1, ((0, 100),), rise_bytes=80, seconds=3.0)
    parts = (
        Part(part(0, 100, 0, 100), leaving={1: 0}),
        Part(part(100, 60, 100, 60), {0: 0}, leaving={1: 1}, input_gradients={2: frozenset({0})}),
        Part(part(60, 10, 60, 10), {0: 1}, leaving={1: 2}, input_gradients={2: frozenset({1})}, sources={0: source}),
    )
    sequence = PartSequence(parts, (2, 1, 0), shared, 1000)
    saved = sequence_peak(sequence, [part_timeline(each, {}) for each in parts])
    # forward 3: a and h are kept, y (10) is made. backward 3: these, y's gradient and h's new one (60)
    assert (saved.forward_bytes[2], saved.backward_bytes[2]) == (1170, 1000 + 100 + 60 + 10 + 10 + 60)
    needs = [part_timeline(each, actions) for each, actions in zip(parts, ({}, {}, {0: RECOMPUTE}), strict=True)]
    again = sequence_peak(sequence, needs)
    assert (needs[2].stored, needs[2].recomputed, again.overhead_s) == ({0}, {0}, 3.0)
    # the forward pass ends with a and y; then a, y, its gradient, and 80 more, or h and its gradient
    assert again.waiting_bytes == saved.waiting_bytes - 60 == 110
    assert again.backward_bytes[2] == 1000 + 100 + 10 + 10 + 60 + 60
    higher = replace(parts[2], sources={0: replace(source, rise_bytes=150)})
    needs[2] = part_timeline(higher, {0: RECOMPUTE})
    assert sequence_peak(sequence, needs).backward_bytes[2] == 1000 + 100 + 10 + 10 + 150
    joined = join_parts(sequence)
    first, second = joined.offsets[1:]
    assert simulate_actions(joined.problem, {second: RECOMPUTE}).overhead_s == 3.0
    assert fxhybrid_peak(joined.problem) >= saved.peak_bytes
    assert joined.by_part({second: RECOMPUTE}) == ({}, {}, {0: RECOMPUTE})
    assert joined.by_part({first: Compress("x"), second: RECOMPUTE})[2] == {}  # it would have to be decoded first


def fxhybrid_peak(problem: Problem) -> int:
    check_problem(problem)
    return simulate_actions(problem, {}).peak_bytes
