"""How good and how fast the solvers are: ``python -m benchmarks.solvers``.

Part ``corpus``: the recorded problems of real models (``tests/corpus``), each at five budgets between the smallest peak
of the heuristic's frontier (share 0) and the peak of the step that keeps everything (share 1). The heuristic (MPS)
builds its frontier once and fits the plan to the budget; the integer program (ILP) starts from that plan and gets 20
seconds, and where that does not close the gap to 1 %, another 60.
gap = (added - proven bound) / max(added, 0.1 % of the step).

Part ``families``: made-up chains, U-nets, dense residual and random layered graphs of growing length; the seconds
of the whole frontier against the number of ops.

Records are appended to a JSON-lines file as they come, so that a run can be split (``--models``, ``--parts``) and
continued; ``--summary FILE`` judges what is there. Times are wall-clock: run nothing beside it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from benchmarks.lib import record_corpus as corpus
from benchmarks.lib.checks import Bar, bar_of, bars_table
from benchmarks.lib.common import Record, add_record_files, names_of, records_of, wide_console
from benchmarks.lib.synthetic_problems import FAMILIES
from fxhybrid.ir.plan import GAP_FLOOR_SHARE
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.solvers.base import PlanFrontier
from fxhybrid.solvers.ilp.solver import IlpSolver
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.portfolio.known_plans import PlanSet

PARTS = ("corpus", "families")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
QUICK_S, LONG_S = 20.0, 60.0
QUICK_GAP, LONG_GAP = 0.05, 0.01
FAMILY_OPS = (500, 2_000, 8_000, 20_000)
LADDER_S = {2_000: 2.0, 20_000: 20.0}
MEAN_RATIO, WORST_RATIO = 1.05, 1.20


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen parts, prints a table of each, then the bars."""
    arguments = _parser().parse_args(argv)
    console = wide_console()
    records = records_of(arguments, lambda: _run(arguments), lambda r: f"{r['model']}/{r['part']} {r['key']}")
    for part, table in (("corpus", corpus_table), ("families", family_table)):
        own = [r for r in records if r["part"] == part]
        if own:
            console.print(table(own))
    console.print(bars_table(judge(records)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", metavar="LIST", help=f"default: all of {','.join(PARTS)}")
    parser.add_argument("--models", metavar="LIST", help=f"for corpus; default: all of {','.join(corpus.names())}")
    parser.add_argument("--families", metavar="LIST", help=f"default: all of {','.join(FAMILIES)}")
    parser.add_argument("--backend", choices=("highs", "cbc"), default="highs", help="of the integer program")
    add_record_files(parser)
    return parser


def _run(arguments: argparse.Namespace) -> Iterator[Record]:
    parts = names_of(arguments.parts, PARTS, "part")
    for name in names_of(arguments.models, corpus.names(), "model") if "corpus" in parts else ():
        for record in corpus_records(corpus.load(name), arguments.backend):
            yield {"part": "corpus", "model": name, **record}
    for name in names_of(arguments.families, FAMILIES, "family") if "families" in parts else ():
        for n_ops in FAMILY_OPS:
            yield {"part": "families", "model": name, "key": n_ops, **family_record(FAMILIES[name](n_ops, 0))}


def n_nodes(problem: Problem) -> int:
    """Forward and backward ops."""
    return len(problem.forward) + len(problem.backward)


def timed_frontier(problem: Problem) -> tuple[PlanFrontier, float]:
    """The heuristic's frontier and its seconds."""
    start = time.perf_counter()
    frontier = build_frontier(problem, max_error=corpus.MAX_ERROR)
    return frontier, time.perf_counter() - start


def corpus_records(problem: Problem, backend: str) -> Iterator[Record]:
    """One record per budget."""
    frontier, frontier_s = timed_frontier(problem)
    plans = PlanSet(problem, frontier, max_error=corpus.MAX_ERROR)
    low, high = frontier.points[-1].peak_bytes, simulate_actions(problem, {}).peak_bytes
    for share in SHARES:
        budget_bytes = int(low + share * (high - low))
        known = plans.fitted(budget_bytes)
        assert known is not None
        record: Record = {
            "key": share,
            "nodes": n_nodes(problem),
            "step_s": problem.step_s,
            "save_all_bytes": high,
            "budget_bytes": budget_bytes,
            "backend": backend,
            "ladder_s": frontier_s,
            "mps_s": known.point.overhead_s,
        }
        warm_start = known.point.actions
        for name, limit_s in (("quick", QUICK_S), ("long", LONG_S)):
            if name == "long" and record["quick_gap"] <= LONG_GAP + 1e-9:
                record |= {"long_gap": record["quick_gap"], "long_solve_s": record["quick_solve_s"]}
                break
            solver = IlpSolver(time_limit_s=limit_s, backend=backend)
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


def family_record(problem: Problem) -> Record:
    """The frontier of one made-up problem."""
    frontier, frontier_s = timed_frontier(problem)
    high = simulate_actions(problem, {}).peak_bytes
    low = frontier.points[-1]
    return {
        "nodes": n_nodes(problem),
        "candidates": len(problem.candidates),
        "ladder_s": frontier_s,
        "rungs": len(frontier.points),
        "reach": low.peak_bytes / high,
        "dearest": low.overhead_s / problem.step_s,
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


def family_table(records: Sequence[Record]) -> Table:
    """One row per made-up problem."""
    table = Table(title="families: the whole ladder of the heuristic")
    for name in ("family", "nodes", "candidates", "ladder", "rungs", "smallest peak", "its added time"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for r in records:
        numbers = (str(r["nodes"]), str(r["candidates"]), f"{r['frontier_s']:.2f} s", str(r["rungs"]))
        table.add_row(r["model"], *numbers, f"{r['reach']:.3f}", f"{r['dearest']:.1%}")
    return table


def judge(records: Sequence[Record]) -> list[Bar]:
    """The bars that these records speak to."""
    solved = [r for r in records if r["part"] == "corpus"]
    made_up = [r for r in records if r["part"] == "families"]

    def values(field: str) -> dict[str, float]:
        return {f"{r['model']} at {r['key']}": r[field] for r in solved}

    floors = {f"{r['model']} at {r['key']}": GAP_FLOOR_SHARE * r["step_s"] for r in solved}
    exact = values("added_s")
    ratios = {name: (mps + floors[name]) / (exact[name] + floors[name]) for name, mps in values("mps_s").items()}
    mean = {"all": math.exp(statistics.fmean(map(math.log, ratios.values())))} if ratios else {}
    bars = [
        bar_of("ILP, 20 s", f"gap <= {QUICK_GAP:.0%}", values("quick_gap"), QUICK_GAP, "{:.2%}"),
        bar_of("ILP, 60 s", f"gap <= {LONG_GAP:.0%}", values("long_gap"), LONG_GAP + 1e-9, "{:.2%}"),
        bar_of("MPS, mean", f"added + 0.1 % of step, / ILP <= {MEAN_RATIO}", mean, MEAN_RATIO, "{:.3f}"),
        bar_of("MPS, each", f"added + 0.1 % of step, / ILP <= {WORST_RATIO}", ratios, WORST_RATIO, "{:.3f}"),
    ]
    for n_ops, limit_s in LADDER_S.items():
        frontiers = {r["model"]: r["ladder_s"] for r in made_up if r["key"] == n_ops}
        bars.append(bar_of(f"ladder, {n_ops} ops", f"<= {limit_s:.0f} s", frontiers, limit_s, "{:.2f} s"))
    growth = {}
    for name in dict.fromkeys(r["model"] for r in made_up):
        own = [r for r in made_up if r["model"] == name]
        if len(own) > 1:
            growth[name] = fitted_exponent({r["nodes"]: r["ladder_s"] for r in own})
    limit = fitted_exponent({n: n * math.log(n) for n in FAMILY_OPS})
    asked = f"seconds ~ ops^x: x <= {limit:.2f}, as n log n has it"
    bars.append(bar_of("ladder, growth", asked, growth, limit, "x = {:.2f}"))
    return bars


def fitted_exponent(values: Mapping[int, float]) -> float:
    """The power of its key that each value grows with: the slope of the best line through both logarithms."""
    keys, found = zip(*((math.log(n), math.log(value)) for n, value in values.items()), strict=True)
    return statistics.linear_regression(keys, found).slope


if __name__ == "__main__":
    main()
