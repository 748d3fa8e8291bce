"""Plans recorded problems again and compares with an earlier run.

A change that should not touch the plans is shown not to: the problems of ``tests/corpus``, and those of all small suite
models as captured now, are planned for the whole frontier, by the integer program and for the smallest peak. Nothing
here depends on the machine's speed: operators of the suite models get seconds from the bytes that they touch, the
heuristic is limited by counts, and the integer program stops at a gap. Where it runs into its time limit instead, the
record says so, and the comparison allows ``LIMITED_SLACK``.

    python -m benchmarks.replay --json before.jsonl
    python -m benchmarks.replay --against benchmarks/results/replay.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.lib import record_corpus as corpus
from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.results import Record, append_record, read_records
from fxhybrid import suite
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.cli.model_spec import suite_spec
from fxhybrid.ir.plan import Action, Actions, Compress
from fxhybrid.ir.problem import CodecOption, Op, Problem
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.options import Options
from fxhybrid.passes.expected_backward import ALL_ARRIVE
from fxhybrid.pipeline import prepare_traced, trace_plain
from fxhybrid.solvers.ilp.min_peak import MinPeakSolver
from fxhybrid.solvers.ilp.solver import IlpSolver
from fxhybrid.solvers.mps.frontier_search import build_frontier
from fxhybrid.solvers.portfolio.extend_plans import frontier_plans, polish_for
from fxhybrid.solvers.portfolio.known_plans import plans_of

MINUTES = 15
NEEDS = "transformers"

SHARES = (0.1, 0.4, 0.7)  # of the way from the smallest peak to that of the save-all step
ILP_GAP, ILP_LIMIT_S = 0.05, 120.0
MIN_PEAK_LIMIT_S = 20.0
LIMITED_SLACK = 5e-3
BYTES_PER_S = 1e10  # of an operator, and of a codec
SUITE_ERROR = 0.1 / 3
FIGURES = ("peak_bytes", "added_s")


def main(argv: Sequence[str] | None = None) -> None:
    """Plans all problems, and lists what differs from an earlier run."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    parser.add_argument("--against", type=Path, metavar="FILE", help="records of an earlier run to compare with")
    parser.add_argument("--corpus", metavar="LIST", help=f"default: all of {','.join(corpus.names())}")
    parser.add_argument(
        "--models", metavar="LIST", help=f"small suite models; default: all of {','.join(suite.names())}"
    )
    arguments = parser.parse_args(argv)
    records = []
    for record in _run(arguments.corpus, arguments.models):
        records.append(record)
        append_record(arguments.json, record)
        print(f"{record['model']} {record['part']} {record['key']}: {_figures(record)}", flush=True)
    if arguments.against:
        table, worse = compared(read_records(arguments.against), records)
        wide_console().print(table)
        raise SystemExit(1 if worse else 0)


def _run(recorded: str | None, models: str | None) -> Iterator[Record]:
    for name in names_of(recorded, corpus.names(), "corpus problem"):
        for record in plan_records(corpus.load(name), corpus.MAX_ERROR):
            yield {"model": f"corpus {name}", **record}
    for name in names_of(models, suite.names(), "model"):
        problem = small_problem(name)
        values = dataclasses.astuple(unnamed(problem))  # names of fields may change
        yield {"model": f"small {name}", "part": "problem", "key": "digest", "digest": digest(repr(values))}
        for record in plan_records(problem, SUITE_ERROR):
            yield {"model": f"small {name}", **record}


def small_problem(name: str) -> Problem:
    """A small suite model's problem with seconds that follow from bytes."""
    target = suite_spec(suite.load(name, "small"))
    args, kwargs = ((), target.inputs) if isinstance(target.inputs, dict) else (target.inputs, {})
    options = Options.checked(budget=1.0, loss_fn=target.loss_fn)
    step = Step(target.model, options.loss_fn, options.return_outputs)
    traced = trace_plain(step, StepCall(args, kwargs, target.loss_args), options)  # other layouts depend on speed
    found = prepare_traced(traced, ALL_ARRIVE).problem
    torch.compiler.reset()
    return with_byte_seconds(found)


def with_byte_seconds(problem: Problem) -> Problem:
    """The problem with every operator and codec as fast as the bytes that it touches allow."""
    sizes = [tensor.size_bytes for tensor in problem.tensors]

    def op(old: Op) -> Op:
        return dataclasses.replace(old, seconds=sum(sizes[t] for t in (*old.inputs, *old.outputs)) / BYTES_PER_S)

    def codec(old: CodecOption, size_bytes: int) -> CodecOption:
        touched_s = (size_bytes + old.encoded_bytes) / BYTES_PER_S
        return dataclasses.replace(old, encode_s=touched_s, decode_s=touched_s)

    tensors = tuple(
        dataclasses.replace(t, codecs=tuple(codec(option, t.size_bytes) for option in t.codecs))
        for t in problem.tensors
    )
    return dataclasses.replace(
        problem, tensors=tensors, forward=tuple(map(op, problem.forward)), backward=tuple(map(op, problem.backward))
    )


def plan_records(problem: Problem, max_error: float) -> Iterator[Record]:
    """The frontier, fitted plans, the integer program's plans and the smallest peak."""
    frontier = build_frontier(problem, max_error=max_error)
    points = [(point.peak_bytes, point.overhead_s) for point in frontier.points]

    def plan_record(actions: Actions, peak_bytes: int, overhead_s: float) -> Record:
        return {"peak_bytes": peak_bytes, "added_s": overhead_s, "digest": digest_of(problem, [actions])}

    yield {
        "part": "frontier",
        "key": "mps",
        "points": points,
        "digest": digest_of(problem, (r.actions for r in frontier.points)),
    }
    plans = frontier_plans(problem, max_error=max_error)
    low, high = plans.smallest.peak_bytes, simulate_actions(problem, {}).peak_bytes
    yield {"part": "plan", "key": "smallest", **plan_record(plans.smallest.actions, low, plans.smallest.overhead_s)}
    budgets = {share: int(low + share * (high - low)) for share in SHARES}
    fresh = plans_of(problem, frontier.points, max_error=max_error)
    for share, budget_bytes in budgets.items():
        fresh = polish_for(fresh, budget_bytes)
        known = fresh.cheapest(budget_bytes)
        assert known is not None, "every share lies above the frontier's smallest peak"
        yield {
            "part": "mps",
            "key": share,
            **plan_record(known.point.actions, known.point.peak_bytes, known.point.overhead_s),
        }
        solver = IlpSolver(time_limit_s=ILP_LIMIT_S, gap=ILP_GAP)
        result = solver.solve(problem, budget_bytes, max_error=max_error, warm_start=known.point.actions)
        limited = result.solve_s >= ILP_LIMIT_S
        figures = plan_record(result.actions, result.peak_bytes, result.overhead_s)
        yield {"part": "ilp", "key": share, **figures, "lower_bound_s": result.lower_bound_s, "limited": limited}
    lowest = MinPeakSolver(time_limit_s=MIN_PEAK_LIMIT_S).solve(
        problem, max_error=max_error, warm_start=plans.smallest.actions
    )
    yield {
        "part": "smallest peak",
        "key": "ilp",
        **plan_record(lowest.actions, lowest.peak_bytes, 0.0),
        "lower_bound_bytes": lowest.lower_bound_bytes,
        "limited": not lowest.proven,
    }


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unnamed(problem: Problem) -> Problem:
    """The problem with codecs that differ in their figures only: names may change."""
    tensors = (
        dataclasses.replace(t, codecs=tuple(dataclasses.replace(option, codec="") for option in t.codecs))
        for t in problem.tensors
    )
    return dataclasses.replace(problem, tensors=tuple(tensors))


def digest_of(problem: Problem, plans: Iterable[Actions]) -> str:
    """A short name for the actions of several plans; a codec counts by its place among those offered."""

    def name(t: int, action: Action) -> str:
        if not isinstance(action, Compress):
            return str(action)
        return str([option.codec for option in problem.tensors[t].codecs].index(action.codec))

    return digest(repr([sorted((t, name(t, action)) for t, action in actions.items()) for actions in plans]))


def _figures(record: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {record[name]}" for name in (*FIGURES, "digest") if name in record)


def compared(before: Sequence[Record], after: Sequence[Record]) -> tuple[Table, int]:
    """A table of all differences, and how many of them are for the worse."""
    table, worse, same = Table(title="replay"), 0, 0
    for name in ("case", "before", "after", "verdict"):
        table.add_column(name)
    known = {(r["model"], r["part"], r["key"]): r for r in before}
    for record in after:
        key = (record["model"], record["part"], record["key"])
        old = known.get(key)
        verdict = "not recorded before" if old is None else verdict_of(old, record)
        if verdict == "same":
            same += 1
            continue
        worse += verdict == "worse"
        table.add_row(" ".join(map(str, key)), _figures(old or {}), _figures(record), verdict)
    table.caption = f"{same} of {len(after)} the same, {worse} worse"
    return table, worse


def verdict_of(old: Record, new: Record) -> str:
    """``same``, ``better`` or ``worse``; plans of one figure each are compared by it, frontiers point by point."""
    if old["digest"] == new["digest"]:
        return "same"
    if old["part"] == "problem":
        return "worse"
    if old["part"] == "frontier":
        covered = all(any(p <= peak and s <= added + 1e-12 for p, s in new["points"]) for peak, added in old["points"])
        return "better" if covered else "worse"
    slack = LIMITED_SLACK if old.get("limited") or new.get("limited") else 0.0
    figure = "peak_bytes" if old["part"] in ("plan", "smallest peak") else "added_s"
    return "better" if new[figure] <= old[figure] * (1 + slack) + 1e-12 else "worse"


if __name__ == "__main__":
    main()
