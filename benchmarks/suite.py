"""Measures peaks, step times and exactness of compiled suite models against the unmodified ones.

Each part can be run on its own, and records are appended to a JSON-lines file as they come, so that a run can
be split and continued; ``--summary FILE`` only judges what is there.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from rich.table import Table

from benchmarks.lib.checks import Check, check_of, checks_table
from benchmarks.lib.common import Bench, add_record_files, names_of, records_of, wide_console
from benchmarks.lib.results import Record
from benchmarks.lib.suite_parts import PARTS, Session, run_parts
from fxhybrid import suite
from fxhybrid.units import format_bytes

MINUTES = 120
NEEDS = "transformers"

Row = Callable[[Record], tuple[str, ...]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts chosen and prints one table per part, then the checks."""
    arguments = _parser().parse_args(argv)
    console = wide_console()
    records = records_of(arguments, lambda: _run(arguments), lambda r: f"{r['model']}/{r['part']} {r['key'] or ''}")
    for part in PARTS:
        own = [r for r in records if r["part"] == part and "error" not in r]
        if own:
            console.print(part_table(part, own))
    for record in records:
        if "error" in record:
            console.print(f"{record['model']}/{record['part']}: {record['error']}", style="red", markup=False)
    console.print(checks_table(judge(records)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(suite.names())}")
    parser.add_argument("--parts", metavar="LIST", help=f"default: all of {','.join(PARTS)}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--pairs", type=int, default=31, help="interleaved pairs per timing (default: 31)")
    parser.add_argument("--fresh", action="store_true", help="compile anew for every share, not set_budget")
    add_record_files(parser)
    return parser


def _run(arguments: argparse.Namespace) -> Iterator[Record]:
    wide_console().print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", highlight=False)
    for name in names_of(arguments.models, suite.names(), "model"):
        session = Session(Bench(name, arguments.size), arguments.pairs, arguments.fresh)
        yield from run_parts(session, names_of(arguments.parts, PARTS, "part"))
        torch.compiler.reset()
        del session
        gc.collect()


def part_table(part: str, records: Sequence[Record]) -> Table:
    """The table of one part, a row per record."""
    columns, row = _TABLES[part]
    table = Table(title=part)
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "actions", "note") else "right")
    for record in records:
        table.add_row(*row(record))
    return table


def _reach_row(r: Record) -> tuple[str, ...]:
    return (
        r["model"],
        format_bytes(r["eager_peak_bytes"]),
        _ms(r["eager_s"]),
        format_bytes(r["minimum_bytes"]),
        f"{r['minimum_share']:.3f}",
        format_bytes(r["measured_bytes"]),
        f"{r['compile_s']:.1f} s",
    )


def _budget_row(r: Record) -> tuple[str, ...]:
    return (
        r["model"],
        f"{r['share']:.2f}",
        format_bytes(r["budget_bytes"]),
        format_bytes(r["predicted_bytes"]),
        format_bytes(r["measured_bytes"]),
        f"{r['predicted_bytes'] / r['measured_bytes'] - 1:+.2%}",
        "yes" if r["measured_bytes"] <= r["budget_bytes"] else "NO",
        f"{r['gradient_error']:.3f}",
        _ms(r["added_s"]),
        "1.02 x smallest" if "refused" in r else r["solver"],
    )


def _exact_row(r: Record) -> tuple[str, ...]:
    return (
        r["model"],
        r["compression"],
        f"{r['share']:.3f}",
        "yes" if r["measured_bytes"] <= r["budget_bytes"] else "NO",
        "yes" if r["same_bits"] else "NO",
        "yes" if r["eager_repeats"] else "NO",
    )


def _cheap_row(r: Record) -> tuple[str, ...]:
    return (
        r["model"],
        f"{r['share']:.2f}",
        f"{r['ratio']:.3f}",
        f"{r['planned_ratio']:.3f}",
        str(r["pairs"]),
        "the smallest in reach" if r["refused"] else "",
    )


def _monotone_row(r: Record) -> tuple[str, ...]:
    points = r["points"]
    return (
        r["model"],
        " ".join(f"{p['measured_bytes'] / 2**20:.1f}" for p in points),
        " ".join(f"{p['overhead_s'] * 1e3:.1f}" for p in points),
        f"{max(p['set_budget_s'] for p in points):.2f} s",
    )


def _technique_row(r: Record) -> tuple[str, ...]:
    def order(name: str) -> str:
        found = r.get(f"{name}_order")
        if found is None:
            return ""
        return found.get("error") or f"{found['median_ratio']:.2f} x (p {found['p_value']:.3f})"

    def added(name: str) -> str:
        return "not reached" if r[f"{name}_s"] is None else _ms(r[f"{name}_s"])

    names = ("recompute", "compress")
    return r["model"], f"{r['share']:.2f}", _ms(r["hybrid_s"]), *(f(n) for n in names for f in (added, order))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


_TABLES: dict[str, tuple[tuple[str, ...], Row]] = {
    "reach": (
        ("model", "eager peak", "eager step", "smallest peak", "share", "measured at 1.02 x", "compile"),
        _reach_row,
    ),
    "budget": (
        ("model", "share", "budget", "predicted", "measured", "off", "kept", "grad error", "added", "note"),
        _budget_row,
    ),
    "exact": (("model", "compression", "share", "kept", "bit-equal", "eager repeats itself"), _exact_row),
    "cheap": (("model", "share", "step ratio", "planned ratio", "pairs", "note"), _cheap_row),
    "monotone": (("model", "measured peaks, MiB", "planned added, ms", "set_budget"), _monotone_row),
    "techniques": (
        ("model", "share", "hybrid", "recompute only", "measured", "compress only", "measured"),
        _technique_row,
    ),
}

REACH = {"mobilenetv2": 0.30, "bert": 0.45, "resnet50": 0.55, "vit": 0.40, "gpt2": 0.40}
NOT_TIMED = ("gru",)
MEAN_RATIO, EACH_RATIO = 1.10, 1.25
PREDICTED_EACH, PREDICTED_MEDIAN = 0.03, 0.015
SLACK = 0.005
COMPILE_S, SET_BUDGET_S = 60.0, 1.0
SIGNIFICANT = 0.05


def judge(records: Sequence[Record]) -> list[Check]:
    """Every check that these records speak to, and the ones they leave open."""
    good = [r for r in records if "error" not in r]
    failed = sorted({f"{r['model']}/{r['part']}" for r in records if "error" in r})
    checks = [
        *_budget_checks(_of(good, "budget")),
        _exact_check(_of(good, "exact")),
        *_monotone_checks(_of(good, "monotone")),
        *_reach_checks(_of(good, "reach")),
        *_cheap_checks(_of(good, "cheap")),
        *_technique_checks(_of(good, "techniques")),
        check_of(
            "compile",
            f"first compile <= {COMPILE_S:.0f} s each",
            {r["model"]: r["compile_s"] for r in good if math.isfinite(r.get("compile_s", math.nan))},
            COMPILE_S,
            "{:.1f} s",
        ),
    ]
    if failed:
        checks.append(Check("parts that failed", "none", ", ".join(failed), False))
    return checks


def _of(records: Sequence[Record], part: str) -> list[Record]:
    return [r for r in records if r["part"] == part]


def _name(record: Record) -> str:
    return f"{record['model']} at {record['share']}"


def _budget_checks(records: list[Record]) -> list[Check]:
    over = {_name(r): r["measured_bytes"] / r["budget_bytes"] for r in records}
    off = {_name(r): abs(r["predicted_bytes"] / r["measured_bytes"] - 1) for r in records}
    errors = {_name(r): r["gradient_error"] / r["max_grad_error"] for r in records}
    middle = {"all": statistics.median(off.values())} if off else {}
    return [
        check_of("budget kept", "measured / budget <= 1, ten steps", over, 1.0, "{:.4f}"),
        check_of("predicted, each", f"within {PREDICTED_EACH:.1%} of measured", off, PREDICTED_EACH, "{:.2%}"),
        check_of("predicted, median", f"within {PREDICTED_MEDIAN:.1%}", middle, PREDICTED_MEDIAN, "{:.2%}"),
        check_of("gradient error", "measured / max_grad_error <= 1", errors, 1.0, "{:.2f}"),
    ]


def _exact_check(records: list[Record]) -> Check:
    asked = "bit-equal to eager and within a tight budget, lossless and recompute only"
    if not records:
        return Check("exact", asked, "", None)
    wrong = [
        f"{r['model']} {r['compression']}"
        for r in records
        if not r["same_bits"] or r["measured_bytes"] > r["budget_bytes"]
    ]
    return Check("exact", asked, ", ".join(wrong) if wrong else f"all {len(records)} cases", not wrong)


def _monotone_checks(records: list[Record]) -> list[Check]:
    rises, falls, moves = {}, {}, {}
    for record in records:
        points, model = record["points"], record["model"]
        measured = [p["measured_bytes"] for p in points]
        added = [p["added_s"] for p in points]
        rises[model] = max((b / a - 1 for a, b in pairwise(measured)), default=0.0)
        falls[model] = max((a - b for a, b in pairwise(added)), default=0.0) * 1e3
        moves[model] = max(p["set_budget_s"] for p in points)
    return [
        check_of("monotone peak", f"never rises by more than {SLACK:.1%}", rises, SLACK, "{:.2%}"),
        check_of("monotone added time", "never falls", falls, 0.0, "{:.2f} ms"),
        check_of("set_budget", f"<= {SET_BUDGET_S:.0f} s, rewrite included", moves, SET_BUDGET_S, "{:.2f} s"),
    ]


def _reach_checks(records: list[Record]) -> list[Check]:
    shares = {r["model"]: r["minimum_share"] for r in records}
    return [
        check_of(
            f"reach {model}",
            f"<= {limit:.2f} of the unmodified peak",
            {model: shares[model]} if model in shares else {},
            limit,
            "{:.3f}",
        )
        for model, limit in REACH.items()
    ]


def _cheap_checks(records: list[Record]) -> list[Check]:
    timed = [r for r in records if r["model"] not in NOT_TIMED]
    ratios = {r["model"]: r["ratio"] for r in timed}
    mean = {}
    if ratios:
        mean["all"] = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return [
        check_of("cheap, mean", f"geometric mean <= {MEAN_RATIO:.2f} x eager", mean, MEAN_RATIO, "{:.3f}"),
        check_of("cheap, each", f"<= {EACH_RATIO:.2f} x eager", ratios, EACH_RATIO, "{:.3f}"),
    ]


def _technique_checks(records: list[Record]) -> list[Check]:
    checks = []
    for name in ("recompute", "compress"):
        reached = [r for r in records if r[f"{name}_s"] is not None]
        excess = {_name(r): (r["hybrid_s"] - r[f"{name}_s"]) * 1e3 for r in reached}
        checks.append(
            check_of(f"hybrid against {name} only", "planned added time is not above", excess, 0.0, "+{:.2f} ms")
        )
    orders = {
        f"{_name(r)} {n}": r[f"{n}_order"] for r in records for n in ("recompute", "compress") if f"{n}_order" in r
    }
    checks.append(_order_check(orders))
    return checks


def _order_check(orders: dict[str, Record]) -> Check:
    asked = f"sign test agrees where plans differ by 5 % of a step (p <= {SIGNIFICANT})"
    if not orders:
        return Check("measured order", asked, "", None)
    against = [name for name, order in orders.items() if order.get("p_value", 1.0) > SIGNIFICANT]
    found = ", ".join(against) if against else f"all {len(orders)} cases"
    return Check("measured order", asked, found, not against)


if __name__ == "__main__":
    main()
