"""Writes the tables of README.md and docs/ from the committed results of benchmark runs.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``, and comes from a file in
``benchmarks/results``, which a run with ``--json`` writes. Rows that were transcribed from a table printed before such
files existed serve until the records of a run make rows of that table.

    python -m benchmarks.tables            # writes
    python -m benchmarks.tables --check    # fails where documents and results differ
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import convnets, operators, second_start, table_rows, torch_versions
from benchmarks.lib import federated_tables, zoo_results
from benchmarks.lib.results import RESULTS, Record, latest, read_headed
from benchmarks.studies import frontier_phases
from benchmarks.table_rows import Row

MINUTES = 0.1
NEEDS = ""
ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"<!-- table: (?P<name>.+?) -->\n(?P<body>.*?)<!-- /table -->", re.S)


@dataclass(frozen=True)
class DocTable:
    """Describes one table of the documents.

    Attributes:
        results: name of its file in ``benchmarks/results``, without suffix.
        columns: heads of the columns.
        rows: makes rows from the records of runs.
    """

    results: str
    columns: Row
    rows: Callable[[Sequence[Record]], Iterable[Row]]


TABLES = {
    "suite": DocTable(
        "suite",
        (
            *("model", "unmodified peak", "smallest reachable (share)", "a budget 2 % above it"),
            *("measured peak there", "step time at a share of the peak", "first compile"),
        ),
        table_rows.suite_rows,
    ),
    "convergence": DocTable(
        "convergence",
        ("task", "peak share", "float32 (spread over seeds)", "fxhybrid", "difference"),
        table_rows.convergence_rows,
    ),
    "held-out error, small": DocTable(
        "held_out_error_small",
        ("when", "largest error of the planned batch / limit", "largest 95 % quantile of the others / limit"),
        table_rows.held_out_rows,
    ),
    "held-out error, full": DocTable(
        "held_out_error",
        (
            *("full size, error / limit", "start: planned batch, others"),
            *("same plan after training: others", "planned anew: planned batch, others"),
        ),
        table_rows.held_out_case_rows,
    ),
    "peers": DocTable(
        "peers",
        (
            *("model", "way", "peak, of eager's", "time, of eager's (gradient error)", "first step"),
            "fxhybrid at no higher a peak",
        ),
        table_rows.peer_rows,
    ),
    "convnets": DocTable("convnets", convnets.COLUMNS, convnets.rows),
    "overhead": DocTable(
        "overhead", ("model", "loss", "eager step, ms", "processor time, of eager's"), table_rows.overhead_rows
    ),
    "int8 hooks": DocTable("int8_hooks", ("model", "int8 hooks", "fxhybrid"), table_rows.no_rows),
    "channelwise": DocTable(
        "channelwise", ("bytes shared by", "ResNet-50", "MobileNetV2"), table_rows.channelwise_rows
    ),
    "solvers, corpus": DocTable(
        "solvers",
        (
            *("model", "ops", "frontier, s", "MPS / ILP, mean", "worst"),
            *("gap after 20 s, worst", "after 60 s, worst", "ILP, s, median"),
        ),
        table_rows.corpus_rows,
    ),
    "second starts": DocTable("second_start", second_start.COLUMNS, second_start.rows),
    "frontier phases": DocTable("frontier_phases", frontier_phases.COLUMNS, frontier_phases.summary_rows),
    "solvers, synthetic": DocTable(
        "solvers", ("problem", "500 ops", "2,000 ops", "8,000 ops", "20,000 ops"), table_rows.synthetic_rows
    ),
    "operators": DocTable("operators", ("result", "operators", "which"), operators.summary_rows),
    "federated, ratios": DocTable("federated", federated_tables.RATIO_COLUMNS, federated_tables.ratio_rows),
    "federated, times": DocTable("federated", federated_tables.TIME_COLUMNS, federated_tables.time_rows),
    "federated, failures": DocTable("federated", federated_tables.FAILURE_COLUMNS, federated_tables.failure_rows),
    "federated, asynchronous": DocTable("federated", federated_tables.RATIO_COLUMNS, federated_tables.buffered_rows),
    "federated, both asynchronous": DocTable(
        "federated", federated_tables.RATIO_COLUMNS, federated_tables.among_buffered_rows
    ),
    "forecasts": DocTable("predictor", ("round, s", "30", "60", "120", "300", "600", "1800"), table_rows.forecast_rows),
    "forecasts, populations": DocTable(
        "predictor", ("population", "30", "60", "120", "300", "600", "1800"), table_rows.forecast_population_rows
    ),
    "versions": DocTable("torch_versions", ("environment", "core tests passed", "failed"), torch_versions.rows),
    "zoo, counts": DocTable("zoo", zoo_results.COUNT_COLUMNS, zoo_results.count_rows),
    "zoo, models": DocTable("zoo", zoo_results.MODEL_COLUMNS, zoo_results.model_rows),
    "zoo, failures": DocTable("zoo", zoo_results.FAILURE_COLUMNS, zoo_results.failure_rows),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes all tables, or says which differ."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document differs")
    arguments = parser.parse_args(argv)
    differing = [path for path in documents() if filled(path) != path.read_text(encoding="utf-8")]
    if not arguments.check:
        for path in differing:
            path.write_text(filled(path), encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    elif differing:
        names = ", ".join(str(path.relative_to(ROOT)) for path in differing)
        raise SystemExit(f"{names}: tables differ from benchmarks/results; run python -m benchmarks.tables")


def documents() -> list[Path]:
    """Returns README.md and all of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(path: Path) -> str:
    """Returns a document's text with every marked table written again.

    Raises:
        SystemExit: a marker names no known table.
    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"{path}: no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n\n{markdown(name, TABLES[name])}\n\n<!-- /table -->"

    return MARKED.sub(made, path.read_text(encoding="utf-8"))


def markdown(name: str, table: DocTable, folder: Path = RESULTS) -> str:
    """Returns one table, and below it which runs its rows come from."""
    headed = read_headed(folder / f"{table.results}.jsonl")
    measured = [(header, record) for header, record in headed if not record.get("transcribed")]
    rows = list(table.rows(latest(record for _, record in measured))) if measured else []
    if not rows:
        measured = [(header, record) for header, record in headed if record.get("table") == name]
        rows = [tuple(record["cells"]) for _, record in measured]
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, *rows)]
    lines.insert(1, "|" + "---|" * len(table.columns))
    return "\n".join((*lines, "", *dict.fromkeys(origin(header) for header, _ in measured)))


def origin(header: Record) -> str:
    """Returns a paragraph on where figures come from: command, machine and versions, as far as they are known."""
    known = [
        *(header[name] for name in ("cpu",) if header.get(name)),
        *(f"{name}: {header[name]}" for name in ("cores", "threads") if header.get(name)),
        *(f"{name} {header[name]}" for name in ("torch", "python", "highs", "fxhybrid") if header.get(name)),
        *(header[name] for name in ("date",) if header.get(name)),
    ]
    machine = f" on {', '.join(known)}" if known else ""
    return f"Printed by `{header['command']}`{machine}{' (transcribed)' if header.get('transcribed') else ''}."


if __name__ == "__main__":
    main()
