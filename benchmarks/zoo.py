"""Trains small, untrained models of many architectures within budgets and compares their steps with eager.

Each architecture of transformers, timm and torchvision takes two steps of SGD with its own loss: lossless at budget
1.0, and at the smallest budget for which there is a plan. Records are appended to a JSON-lines file as they come; a run
leaves out what the file holds already, so that it can be split and continued, unless ``--only`` names it.

    python -m benchmarks.zoo --json benchmarks/results/zoo.jsonl
    python -m benchmarks.zoo --only "gpt2,timm test_vit"

``pip install --no-deps timm torchvision`` is enough, whatever torch they were built for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import names_of, wide_console
from benchmarks.lib.results import Record, append_record, read_records
from benchmarks.lib.zoo_list import ARCHITECTURES, installed
from benchmarks.lib.zoo_processes import records_of_all
from benchmarks.lib.zoo_results import result_of
from benchmarks.lib.zoo_trial import BREAK, FAULTS, WORKS

MINUTES = 60
NEEDS = "transformers, timm, torchvision"
LEAST_TRACED = 80


def main(argv: Sequence[str] | None = None) -> None:
    """Tries the architectures chosen, and prints what does not work."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="LIST", help="names; default: all whose library is installed")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="for each architecture (default: 300)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    arguments = parser.parse_args(argv)
    console = wide_console()
    records = read_records(arguments.json) if arguments.json and arguments.json.exists() else []
    done = {record["model"] for record in records}
    missing = sorted({ARCHITECTURES[name].library for name in ARCHITECTURES.keys() - set(installed())})
    if arguments.only is None:
        names = [name for name in installed() if name not in done]
        if missing:
            console.print(f"left out for want of packages: architectures of {', '.join(missing)}")
    else:
        names = names_of(arguments.only, installed(), "architecture whose library is installed")
    for record in records_of_all(names, jobs=arguments.jobs, timeout_s=arguments.timeout):
        append_record(arguments.json, record)
        records = [*(r for r in records if r["model"] != record["model"]), record]
        console.print(f"{record['model']}: {result_of(record)}, {record.get('seconds', 0):.0f} s", highlight=False)
    console.print(results_table(records))
    console.print(checks_table(judge(records)))


def results_table(records: Sequence[Record]) -> Table:
    """Builds a table with a row for each architecture that does not work."""
    table = Table(title="Architectures that do not work")
    for name in ("architecture", "kind", "result"):
        table.add_column(name)
    for record in records:
        if record["verdict"] != WORKS:
            table.add_row(record["model"], record.get("kind", ""), result_of(record))
    return table


def judge(records: Sequence[Record]) -> list[Check]:
    """Asks that enough architectures trace, and that all that do work."""
    found = Counter(record["verdict"] for record in records)
    faults = [f"{r['model']}: {r['verdict']}" for r in records if r["verdict"] in FAULTS]
    n_traced = found.total() - found[BREAK]
    return [
        Check("one graph", f"at least {LEAST_TRACED}", f"{n_traced} of {found.total()}", n_traced >= LEAST_TRACED),
        Check("of one graph, work", "all", f"{found[WORKS]} of {n_traced}", found[WORKS] == n_traced),
        Check("wrong, over the budget or crashing", "none", ", ".join(faults) or "none", not faults),
    ]


if __name__ == "__main__":
    main()
