"""The suite benchmark: ``python -m benchmarks.suite``.

Each part can be run on its own, and records are appended to a JSON-lines file as they come, so that a run can
be split and continued; ``--summary FILE`` only judges what is there.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.table import Table

from benchmarks.bars import bars_table, judge
from benchmarks.common import Bench, Record, add_record_files, names_of, records_of, wide_console
from benchmarks.parts import PARTS, Session, run_parts
from fxhybrid import suite
from fxhybrid.errors import format_bytes

Row = Callable[[Record], tuple[str, ...]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts chosen and prints one table per part, then the bars."""
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
    console.print(bars_table(judge(records)))


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
        torch._dynamo.reset()
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
        " ".join(f"{p['added_s'] * 1e3:.1f}" for p in points),
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

if __name__ == "__main__":
    main()
