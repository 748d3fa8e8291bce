"""Compares memory, gradient error and step time with all other common ways to train in less memory or time.

Each way runs in a process of its own, and all of a model run their steps in turn, so that what else the machine does
falls on all alike. fxhybrid runs at the measured peak of each other way, where the two are compared by time, and
without dropout where that way does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import add_record_files, names_of, records_of, wide_console
from benchmarks.lib.peer_methods import BOTH_OURS, EAGER, INT8, METHODS, OURS, ours_for
from benchmarks.lib.peer_process import Case, Peer
from benchmarks.lib.results import Record
from fxhybrid import suite
from fxhybrid.optional_imports import require

MINUTES = 120
NEEDS = "transformers"

SETTINGS = {"activation_memory_budget": ("0.5", "0.25", "0.0")}
SHARES = (0.75, 0.5)  # of the eager peak, where fxhybrid runs in any case
SAME_PEAK = 0.02  # peaks nearer than that are one


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=__doc__)
    known = suite.names()
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(known)}")
    parser.add_argument("--methods", metavar="LIST", help=f"default: all of {','.join(METHODS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--rounds", type=int, default=31, help="steps of each way, in turn (default: 31)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw peak against time, a panel for each model")
    add_record_files(parser)
    arguments = parser.parse_args(argv)
    methods = names_of(arguments.methods, METHODS, "method")
    models = names_of(arguments.models, known, "model")

    def run() -> Iterator[Record]:
        return itertools.chain.from_iterable(compare(m, arguments.size, methods, arguments.rounds) for m in models)

    records = newest(records_of(arguments, run, lambda record: f"{record['model']}: {record['key']}"))
    if arguments.plot:
        draw(records, arguments.plot)
    console = wide_console()
    console.print(peers_table(records))
    console.print(checks_table(judge(records)))


def compare(model: str, size: suite.Size, methods: Sequence[str], rounds: int) -> Iterator[Record]:
    """Yields a record for each way to train a model."""
    cases = [
        Case(model, size, name, setting)
        for name in dict.fromkeys((EAGER, *methods))
        if name not in BOTH_OURS and model in (METHODS[name].models or (model,))
        for setting in SETTINGS.get(name, ("",))
    ]
    with contextlib.ExitStack() as ending:
        cache = ending.enter_context(tempfile.TemporaryDirectory())

        def started(case: Case) -> Peer:
            peer = Peer(case, cache)
            ending.callback(peer.close)
            return peer

        peers = [started(case) for case in cases]
        own = [(name, n) for name in BOTH_OURS if name in methods for n in _budgets(peers, name)]
        peers += [started(Case(model, size, name, str(n))) for name, n in own]
        running = [peer for peer in peers if "error" not in peer.found]
        seconds = interleaved(running, rounds)
    eager_peak_bytes = peers[0].found["peak_bytes"]
    for peer in peers:
        record: Record = {"model": model, "part": "peers", "key": peer.case.key, "method": peer.case.method}
        record |= {"eager_peak_bytes": eager_peak_bytes, **peer.found}
        if peer in seconds:
            record |= {"ratio": ratio(seconds, peer, peers[0], 0), "cpu_ratio": ratio(seconds, peer, peers[0], 1)}
        yield record | {"rounds": rounds}


def _budgets(peers: Sequence[Peer], ours: str) -> list[int]:
    """Returns the peaks of ways that a form of fxhybrid is compared with, of near ones the smallest.

    The usual form gets some shares of eager's peak, too.
    """
    eager_bytes = peers[0].found["peak_bytes"]
    alike = [p for p in peers if "error" not in p.found and ours_for(p.case.method, p.case.model) == ours]
    shares = [int(share * eager_bytes) for share in SHARES] if ours == OURS else []
    found: list[int] = []
    for n in sorted((*(p.found["peak_bytes"] for p in alike), *shares)):
        if n <= eager_bytes and (not found or n > found[-1] * (1 + SAME_PEAK)):
            found.append(n)
    return found


def interleaved(peers: Sequence[Peer], rounds: int) -> dict[Peer, list[tuple[float, float]]]:
    """Runs steps of all peers in turn, and each round from another one on; returns their seconds."""
    found: dict[Peer, list[tuple[float, float]]] = {peer: [] for peer in peers}
    for i in range(rounds):
        for k in range(len(peers)):
            peer = peers[(i + k) % len(peers)]
            found[peer].append(peer.step())
    return found


def ratio(seconds: dict[Peer, list[tuple[float, float]]], peer: Peer, eager: Peer, clock: int) -> float:
    """Returns the median over all rounds of a peer's time over eager's in the same round."""
    pairs = zip(seconds[peer], seconds[eager], strict=True)
    return statistics.median(own[clock] / usual[clock] for own, usual in pairs)


def newest(records: Sequence[Record]) -> list[Record]:
    """Returns the last record of each way: a model's ways may run in several parts, each with eager."""
    return list({(r["model"], r["key"]): r for r in records}.values())


def ours_at(record: Record, records: Sequence[Record]) -> Record | None:
    """Returns the fastest run of fxhybrid at no higher a peak than a record's, on the same model."""
    fits = [
        r
        for r in records
        if r["model"] == record["model"]
        and r["method"] == ours_for(record["method"], record["model"])
        and "ratio" in r
        and r["peak_bytes"] <= record["peak_bytes"]
    ]
    return min(fits, key=lambda r: r["ratio"], default=None)


def peers_table(records: Sequence[Record]) -> Table:
    """Builds a table of one row per way, with fxhybrid at no higher a peak."""
    table = Table(title="Peers, and fxhybrid at no higher a peak")
    for name in ("model", "way"):
        table.add_column(name)
    for name in ("peak", "grad error", "time", "CPU time", "first step", "ours: time", "grad error"):
        table.add_column(name, justify="right")
    for r in records:
        if "ratio" not in r:
            table.add_row(r["model"], r["key"], r.get("error", "")[:60])
            continue
        ours = None if r["method"] in BOTH_OURS else ours_at(r, records)
        same = (f"{ours['ratio']:.2f}", f"{ours['gradient_error']:.1e}") if ours else ("", "")
        figures = f"{r['peak_bytes'] / r['eager_peak_bytes']:.2f}", f"{r['gradient_error']:.1e}", f"{r['ratio']:.2f}"
        table.add_row(r["model"], r["key"], *figures, f"{r['cpu_ratio']:.2f}", f"{r['compile_s']:.0f} s", *same)
    return table


def draw(records: Sequence[Record], path: Path) -> None:
    """Draws peak against time, a panel for each model, with lines through the points of fxhybrid."""
    plt = require("matplotlib.pyplot", "a plot")
    timed = [r for r in records if "ratio" in r]
    models = list(dict.fromkeys(r["model"] for r in timed))
    others = list(dict.fromkeys(r["key"] for r in timed if r["method"] not in BOTH_OURS))
    marks = dict(zip(others, itertools.cycle("x+^vsD*P<>"), strict=False))
    figure, axes = plt.subplots(1, len(models), figsize=(4.5 * len(models), 5), squeeze=False, layout="constrained")
    shown: dict[str, Any] = {}
    for axis, model in zip(axes[0], models, strict=True):
        own = [r for r in timed if r["model"] == model]
        for i, name in enumerate(BOTH_OURS):
            ours = sorted((r["peak_bytes"] / r["eager_peak_bytes"], r["ratio"]) for r in own if r["method"] == name)
            if ours:
                (shown[name],) = axis.plot(*zip(*ours, strict=True), "o-", color=f"C{i}")
        for r in own:
            if r["key"] in marks:
                point = r["peak_bytes"] / r["eager_peak_bytes"], r["ratio"]
                (shown[r["key"]],) = axis.plot(*point, marks[r["key"]], color=f"C{2 + others.index(r['key']) % 8}")
        axis.set(title=model, xlabel="peak, share of eager's", ylabel="step time over eager's", xlim=(0, 1.05))
    figure.legend(shown.values(), shown.keys(), fontsize="small", loc="outside lower center", ncols=4)
    figure.savefig(path)


def judge(records: Sequence[Record]) -> list[Check]:
    """Checks where another way is faster at the same peak, and the gradient error against the int8 recipe's."""
    others = [r for r in records if r["method"] not in BOTH_OURS and "ratio" in r]
    compared = [(r, ours) for r in others if (ours := ours_at(r, records)) is not None]
    faster = [
        f"{r['model']}, {r['key']}: {r['ratio']:.2f}, ours {ours['ratio']:.2f}"
        for r, ours in compared
        if r["ratio"] < ours["ratio"]
    ]
    int8 = [(r, ours) for r, ours in compared if r["method"] == INT8]
    worse = [r["model"] for r, ours in int8 if ours["gradient_error"] > r["gradient_error"]]
    return [
        Check("faster ways at the same peak", "none", "; ".join(faster) or "none", not faster if compared else None),
        Check(
            "int8 hooks: gradient error", "below the recipe's", ", ".join(worse) or "all", not worse if int8 else None
        ),
    ]


if __name__ == "__main__":
    main()
