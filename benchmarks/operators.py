"""Compares every operator of PyTorch's operator database with eager: right, refused, wrong or crashing.

Each operator that has a gradient in float32 on the CPU becomes a small module whose parameters are the tensors of a
sample. It is compiled lossless; its steps at the save-all peak and at the smallest budget must leave eager's bits
behind, or compiling must end in an error that names the operator and a way out. Trials run in a worker process, so that
a crash or a hang costs one operator.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import add_record_files, records_of, wide_console
from benchmarks.lib.operator_trials import CRASH, NOT_IN_EAGER, REFUSED, RIGHT, WORST_LAST, operators, serve
from benchmarks.lib.results import Record

MINUTES = 12
NEEDS = "expecttest"

SAMPLES = 2  # of each operator
TIMEOUT_S = 120.0
LEAST_RIGHT_SHARE = 0.92


class Worker:
    """Runs trials in a process of its own, which is started again after a crash or a hang."""

    def __init__(self) -> None:
        """Starts the process."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, SAMPLES), daemon=True)
        self.process.start()
        theirs.close()

    def try_operator(self, name: str) -> Record:
        """Returns the record of one operator; the process is dead if its result is a crash with a ``fatal`` text."""
        self.pipe.send(name)
        try:
            if self.pipe.poll(TIMEOUT_S):
                record: Record = self.pipe.recv()
                return record
            text = f"no result after {TIMEOUT_S:.0f} s"
        except EOFError:
            self.process.join()
            text = f"the process died with code {self.process.exitcode}"
        self.close()
        return {"key": name, "result": CRASH, "text": text}

    @property
    def is_alive(self) -> bool:
        """Whether the process can try another operator."""
        return self.process.is_alive()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()


def trial_records(names: Sequence[str]) -> Iterator[Record]:
    """Yields a record for each operator."""
    worker = Worker()
    try:
        for name in names:
            worker = worker if worker.is_alive else Worker()
            yield worker.try_operator(name)
    finally:
        worker.close()


def counts(records: Sequence[Record]) -> Counter[str]:
    """Counts results; what eager itself gives no gradient for is left out."""
    return Counter(r["result"] for r in records if r["result"] != NOT_IN_EAGER)


def judge(records: Sequence[Record]) -> list[Check]:
    """Asks for enough operators that are right, and for a clear refusal of all others."""
    found = counts(records)
    total = found.total()
    others = [f"{r['key']}: {r['result']}" for r in records if r["result"] not in (RIGHT, REFUSED, NOT_IN_EAGER)]
    share = found[RIGHT] / max(total, 1)
    text = f"{found[RIGHT]} of {total} ({share:.1%})"
    return [
        Check("right", f"at least {LEAST_RIGHT_SHARE:.0%}", text, share >= LEAST_RIGHT_SHARE if total else None),
        Check("neither right nor refused clearly", "none", ", ".join(others) or "none", not others if total else None),
    ]


def summary_rows(records: Sequence[Record]) -> Iterator[tuple[str, str, str]]:
    """Yields a row for each result: how many operators have it, and which, unless they are right."""
    found = counts(records)
    for result in WORST_LAST:
        names = [f"`{r['key']}`" for r in records if r["result"] == result]
        if result == RIGHT:
            yield result, f"{len(names)} ({len(names) / max(found.total(), 1):.1%})".replace("%", " %"), "all others"
        elif names:
            yield result, str(len(names)), ", ".join(names)


def results_table(records: Sequence[Record]) -> Table:
    """Builds a table with a row for each operator that is not right."""
    table = Table(title="Operators that are not right")
    for name in ("operator", "result", "what it says"):
        table.add_column(name)
    for r in records:
        if r["result"] not in (RIGHT, NOT_IN_EAGER):
            table.add_row(r["key"], r["result"], r["text"].strip()[:200])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Tries the operators and prints what is not right."""
    parser = argparse.ArgumentParser("python -m benchmarks.operators", description=__doc__)
    parser.add_argument("--only", metavar="LIST", help="operators by name, or the beginnings of names")
    add_record_files(parser)
    arguments = parser.parse_args(argv)

    def run() -> Iterator[Record]:
        chosen = tuple(arguments.only.split(",")) if arguments.only else ("",)
        return trial_records([name for name in operators() if name.startswith(chosen)])

    records = records_of(arguments, run, lambda r: f"{r['key']}: {r['result']}")
    console = wide_console()
    console.print(results_table(records))
    console.print(checks_table(judge(records)))


if __name__ == "__main__":
    main()
