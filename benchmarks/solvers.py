"""Measures how far the solvers' plans are from proven bounds, and how long they take.

Part ``corpus``: the recorded problems of real models (``tests/corpus``), each at five budgets between the smallest peak
of the heuristic's frontier (share 0) and the peak of the save-all step (share 1). The heuristic (MPS)
builds its frontier once and fits the plan to the budget; the integer program (ILP) starts from that plan and gets 20
seconds, and where that does not close the gap to 1 %, another 60.
gap = (added - proven bound) / max(added, 0.1 % of the step).

Part ``synthetic``: synthetic chains, U-nets, dense residual and random layered graphs of growing length; the seconds
of the whole frontier against the number of ops.

Records are appended to a JSON-lines file as they come, so that a run can be split (``--models``, ``--parts``) and
continued; ``--summary FILE`` checks what is there. Times are wall-clock: run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from benchmarks.lib import record_corpus as corpus
from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import add_record_files, names_of, records_of, wide_console
from benchmarks.lib.results import Record
from benchmarks.lib.synthetic_problems import SYNTHETIC
from fxhybrid.ir.plan import GAP_FLOOR_SHARE
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import PlanFrontier
from fxhybrid.solvers.ilp.solver import IlpSolver
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.portfolio.extend_plans import polish_for
from fxhybrid.solvers.portfolio.known_plans import plans_of

MINUTES = 20
NEEDS = ""

PARTS = ("corpus", "synthetic")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
QUICK_S, LONG_S = 20.0, 60.0
QUICK_GAP, LONG_GAP = 0.05, 0.01
SYNTHETIC_OPS = (500, 2_000, 8_000, 20_000)
FRONTIER_S = {2_000: 2.0, 20_000: 20.0}
MEAN_RATIO, WORST_RATIO = 1.05, 1.20


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen parts, prints a table of each, then the checks."""
    arguments = _parser().parse_args(argv)
    console = wide_console()
    records = records_of(arguments, lambda: _run(arguments), lambda r: f"{r['model']}/{r['part']} {r['key']}")
    for part, table in (("corpus", corpus_table), ("synthetic", synthetic_table)):
        own = [r for r in records if r["part"] == part]
        if own:
            console.print(table(own))
    console.print(checks_table(judge(records)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", metavar="LIST", help=f"default: all of {','.join(PARTS)}")
    parser.add_argument("--models", metavar="LIST", help=f"for corpus; default: all of {','.join(corpus.names())}")
    parser.add_argument("--synthetic", metavar="LIST", help=f"default: all of {','.join(SYNTHETIC)}")
    add_record_files(parser)
    return parser


def _run(arguments: argparse.Namespace) -> Iterator[Record]:
    parts = names_of(arguments.parts, PARTS, "part")
    for name in names_of(arguments.models, corpus.names(), "model") if "corpus" in parts else ():
        for record in corpus_records(corpus.load(name)):
            yield {"part": "corpus", "model": name, **record}
    for name in names_of(arguments.synthetic, SYNTHETIC, "synthetic problem") if "synthetic" in parts else ():
        for n_ops in SYNTHETIC_OPS:
            yield {"part": "synthetic", "model": name, "key": n_ops, **synthetic_record(SYNTHETIC[name](n_ops, 0))}


def n_nodes(problem: Problem) -> int:
    """Forward and backward ops."""
    return len(problem.forward) + len(problem.backward)


def timed_frontier(problem: Problem) -> tuple[PlanFrontier, float]:
    """The heuristic's frontier and its seconds."""
    start = time.perf_counter()
    frontier = build_frontier(problem, max_error=corpus.MAX_ERROR)
    return frontier, time.perf_counter() - start


def corpus_records(problem: Problem) -> Iterator[Record]:
    """One record per budget."""
    frontier, frontier_s = timed_frontier(problem)
    plans = plans_of(problem, frontier.points, max_error=corpus.MAX_ERROR)
    low, high = frontier.points[-1].peak_bytes, simulate_actions(problem, {}).peak_bytes
    for share in SHARES:
        budget_bytes = int(low + share * (high - low))
        plans = polish_for(plans, budget_bytes)
        known = plans.cheapest(budget_bytes)
        assert known is not None
        record: Record = {
            "key": share,
            "nodes": n_nodes(problem),
            "step_s": problem.step_s,
            "save_all_bytes": high,
            "budget_bytes": budget_bytes,
            "frontier_s": frontier_s,
            "mps_s": known.point.overhead_s,
        }
        warm_start = known.point.actions
        for name, limit_s in (("quick", QUICK_S), ("long", LONG_S)):
            if name == "long" and record["quick_gap"] <= LONG_GAP + 1e-9:
                record |= {"long_gap": record["quick_gap"], "long_solve_s": record["quick_solve_s"]}
                break
            solver = IlpSolver(time_limit_s=limit_s)
            result = solver.solve(problem, budget_bytes, max_error=corpus.MAX_ERROR, warm_start=warm_start)
            record |= {
                f"{name}_gap": result.gap(problem.step_s),
                f"{name}_solve_s": result.solve_s,
                "added_s": result.overhead_s,
                "lower_bound_s": result.lower_bound_s,
                "peak_bytes": result.peak_bytes,
                "status": result.status.value,
                "counts": dict(result.details),
            }
        yield record


def synthetic_record(problem: Problem) -> Record:
    """Times the frontier of one synthetic problem."""
    frontier, frontier_s = timed_frontier(problem)
    high = simulate_actions(problem, {}).peak_bytes
    low = frontier.points[-1]
    return {
        "nodes": n_nodes(problem),
        "candidates": len(problem.candidates),
        "frontier_s": frontier_s,
        "points": len(frontier.points),
        "reach": low.peak_bytes / high,
        "highest_overhead": low.overhead_s / problem.step_s,
    }


def corpus_table(records: Sequence[Record]) -> Table:
    """One row per model and budget."""
    table = Table(title="corpus: integer program against heuristic")
    for name in ("model", "nodes", "share", "budget", "MPS", "ILP", "bound", "gap 20 s", "gap 60 s", "solve", "rows"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for r in records:
        table.add_row(
            r["model"],
            str(r["nodes"]),
            f"{r['key']:.2f}",
            f"{r['budget_bytes'] / r['save_all_bytes']:.3f}",
            *(f"{r[name] * 1e3:.2f} ms" for name in ("mps_s", "added_s", "lower_bound_s")),
            f"{r['quick_gap']:.2%}",
            f"{r['long_gap']:.2%}",
            f"{r['long_solve_s']:.1f} s",
            str(int(r["counts"].get("rows", 0))),
        )
    return table


def synthetic_table(records: Sequence[Record]) -> Table:
    """Builds one row per synthetic problem."""
    table = Table(title="synthetic: the whole frontier of the heuristic")
    for name in ("synthetic problem", "nodes", "candidates", "frontier", "points", "smallest peak", "its overhead"):
        table.add_column(name, justify="left" if name == "synthetic problem" else "right")
    for r in records:
        numbers = (str(r["nodes"]), str(r["candidates"]), f"{r['frontier_s']:.2f} s", str(r["points"]))
        table.add_row(r["model"], *numbers, f"{r['reach']:.3f}", f"{r['dearest']:.1%}")
    return table


def judge(records: Sequence[Record]) -> list[Check]:
    """The checks that these records speak to."""
    solved = [r for r in records if r["part"] == "corpus"]
    synthetic = [r for r in records if r["part"] == "synthetic"]

    def values(field: str) -> dict[str, float]:
        return {f"{r['model']} at {r['key']}": r[field] for r in solved}

    floors = {f"{r['model']} at {r['key']}": GAP_FLOOR_SHARE * r["step_s"] for r in solved}
    exact = values("added_s")
    ratios = {name: (mps + floors[name]) / (exact[name] + floors[name]) for name, mps in values("mps_s").items()}
    mean = {"all": math.exp(statistics.fmean(map(math.log, ratios.values())))} if ratios else {}
    checks = [
        check_of("ILP, 20 s", f"gap <= {QUICK_GAP:.0%}", values("quick_gap"), QUICK_GAP, "{:.2%}"),
        check_of("ILP, 60 s", f"gap <= {LONG_GAP:.0%}", values("long_gap"), LONG_GAP + 1e-9, "{:.2%}"),
        check_of("MPS, mean", f"added + 0.1 % of step, / ILP <= {MEAN_RATIO}", mean, MEAN_RATIO, "{:.3f}"),
        check_of("MPS, each", f"added + 0.1 % of step, / ILP <= {WORST_RATIO}", ratios, WORST_RATIO, "{:.3f}"),
    ]
    for n_ops, limit_s in FRONTIER_S.items():
        frontiers = {r["model"]: r["frontier_s"] for r in synthetic if r["key"] == n_ops}
        checks.append(check_of(f"frontier, {n_ops} ops", f"<= {limit_s:.0f} s", frontiers, limit_s, "{:.2f} s"))
    growth = {}
    for name in dict.fromkeys(r["model"] for r in synthetic):
        own = [r for r in synthetic if r["model"] == name]
        if len(own) > 1:
            growth[name] = fitted_exponent({r["nodes"]: r["frontier_s"] for r in own})
    limit = fitted_exponent({n: n * math.log(n) for n in SYNTHETIC_OPS})
    asked = f"seconds ~ ops^x: x <= {limit:.2f}, as n log n has it"
    checks.append(check_of("frontier, growth", asked, growth, limit, "x = {:.2f}"))
    return checks


def fitted_exponent(values: Mapping[int, float]) -> float:
    """The power of its key that each value grows with: the slope of the best line through both logarithms."""
    keys, found = zip(*((math.log(n), math.log(value)) for n, value in values.items()), strict=True)
    return statistics.linear_regression(keys, found).slope


if __name__ == "__main__":
    main()
