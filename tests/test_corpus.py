"""Recorded problems of real models, and hand-made ones whose optimum is worked out in comments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.lib import record_corpus as corpus
from fxhybrid.ir.plan import RECOMPUTE, SAVE, Actions, Compress
from fxhybrid.ir.problem import CodecOption, Fusion, Op, Problem, Tensor
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import Solver, Status
from fxhybrid.solvers.exhaustive import OracleSolver
from fxhybrid.solvers.ilp.solver import IlpSolver

EXACT: tuple[Solver, ...] = (OracleSolver(), IlpSolver(gap=0.0))


def independent() -> Problem:
    """Three tensors made from resident ones: a (100 bytes, 4 s), b (60, 2 s), c (50, 1.5 s); backward reads c, b, a.

    Each backward op makes a gradient of 10 bytes; the last one stays, the others die in the next op.
    """
    tensors = (Tensor("a", 100), Tensor("b", 60), Tensor("c", 50), *(Tensor(f"g{i}", 10) for i in range(3)))
    made = zip((4.0, 2.0, 1.5), (100, 60, 50), strict=True)
    forward = tuple(Op(f"f{i}", (), (i,), seconds, size, pinned=True) for i, (seconds, size) in enumerate(made))
    backward = (Op("b0", (2,), (3,), 1.0, 10), Op("b1", (1, 3), (4,), 1.0, 10), Op("b2", (0, 4), (5,), 1.0, 10))
    return Problem(tensors, forward, backward, (), (), (5,), resident_bytes=0)


def masked() -> Problem:
    """x (80 bytes, 3 s) gives a mask m (10, 0.5 s) and y (80, 1 s); backward reads y, then m or, fused, x instead."""
    tensors = (Tensor("x", 80), Tensor("m", 10), Tensor("y", 80), Tensor("g0", 80), Tensor("g1", 10))
    forward = (
        Op("f0", (), (0,), 3.0, 80, pinned=True),
        Op("mask", (0,), (1,), 0.5, 10),
        Op("f1", (0,), (2,), 1.0, 80, pinned=True),
    )
    backward = (Op("b0", (2,), (3,), 1.0, 80), Op("b1", (1, 3), (4,), 1.0, 10, fusion=Fusion(1, 10)))
    return Problem(tensors, forward, backward, (), (), (4,), resident_bytes=0)


def lossy() -> Problem:
    """Two tensors of 100 bytes, recomputed in 5 s or kept in 25 bytes for 0.1 + 0.1 s at an error of 0.03 each."""
    q8 = CodecOption("q8", 25, 0.1, 0.1, 25, 100, False, 0.03)
    tensors = (Tensor("a", 100, (q8,)), Tensor("b", 100, (q8,)), Tensor("g0", 10), Tensor("g1", 10))
    forward = tuple(Op(f"f{i}", (), (i,), 5.0, 100, pinned=True) for i in range(2))
    backward = (Op("b0", (1,), (2,), 1.0, 10), Op("b1", (0, 2), (3,), 1.0, 10))
    return Problem(tensors, forward, backward, (), (), (3,), resident_bytes=0)


HAND_MADE: tuple[tuple[Problem, int, float, Actions, int], ...] = (
    # Keep all: highest in b0, a + b + c + g0 = 220.
    (independent(), 220, 0.0, {}, 220),
    # Without c (1.5 s) b0 still holds all four: 220. Without b (2 s): b0 holds a + c + g0 = 160, then b is
    # recomputed with a and g0 alive and b1 holds a + b + g0 + g1 = 180.
    (independent(), 219, 2.0, {1: RECOMPUTE}, 180),
    # Without a (4 s): b0 holds b + c + g0 = 120, b1 80, and b2 a + g1 + g2 = 120. No plan is lower: b2 needs a.
    (independent(), 179, 4.0, {0: RECOMPUTE}, 120),
    # By default m is not kept: x waits for b1 instead, and b0 holds x + y + g0 = 240.
    (masked(), 240, 0.0, {}, 240),
    # Kept (0.5 s), m lets x go after f1, which holds m + x + y = 170; b0 holds m + y + g0 = 170. Recomputing x
    # (3 s) is as low: b1 holds x + g0 + g1 = 170.
    (masked(), 239, 0.5, {1: SAVE}, 170),
    # Keep all: b0 holds a + b + g0 = 210. Packing a (0.2 s): packed a + b + g0 = 135, and again a packed, a and g0
    # while a is unpacked: 135.
    (lossy(), 209, 0.2, {0: Compress("q8")}, 135),
    # Packing both would have an error of 0.042, and encoding b with both forms alive takes 150. Recomputing a (5 s):
    # b1 holds a + g0 + g1 = 120.
    (lossy(), 134, 5.0, {0: RECOMPUTE}, 120),
)


@pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("case", range(len(HAND_MADE)))
def test_hand_made(solver: Solver, case: int) -> None:
    problem, budget_bytes, overhead_s, actions, peak_bytes = HAND_MADE[case]
    result = solver.solve(problem, budget_bytes, max_error=0.04)
    assert result.status is Status.OPTIMAL
    assert (result.overhead_s, result.lower_bound_s) == (pytest.approx(overhead_s), pytest.approx(overhead_s))
    assert result.peak_bytes == peak_bytes
    assert result.actions == actions


@pytest.mark.parametrize("name", corpus.names())
def test_recorded_problems_read(name: str) -> None:
    text = (corpus.CORPUS / f"{name}.json").read_text(encoding="utf-8")
    problem = corpus.load(name)
    assert corpus.compact_json(problem) == text
    assert problem.step_s > 0
    # resident parameters and gradients alone never make the peak: there is something to plan
    assert simulate_actions(problem, {}).peak_bytes > problem.resident_bytes


def test_all_models_are_recorded() -> None:
    assert set(corpus.names()) == set(corpus.MODELS)
    assert sum(path.stat().st_size for path in Path(corpus.CORPUS).glob("*.json")) < 3_000_000


def test_recorded_twice_is_the_same_problem(tmp_path: Path) -> None:
    # seconds differ from run to run; tensors, ops and bytes do not
    def recorded(name: str) -> dict[str, object]:
        corpus.main(["--models", "mlp", "--size", "small", "--out", str(tmp_path / name)])
        raw = json.loads((tmp_path / name / "mlp.json").read_text(encoding="utf-8"))
        return {"tensors": [t["size_bytes"] for t in raw["tensors"]], "ops": [o["name"] for o in raw["forward"]]}

    assert recorded("first") == recorded("second")
