"""Files of benchmark records: JSON lines, each run headed by the machine, the versions and the command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"
CHECKOUT = f"{Path(__file__).parents[2]}/"  # where a run lives is nobody's business: errors name files within
HEADER = "header"  # the part of the record that heads a run
CASE = ("model", "part", "key", "task", "cell", "policy", "seed")  # what tells records apart


def run_header() -> Record:
    """Describes this process: machine, versions, date and command."""
    import torch

    return {
        "part": HEADER,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "highs": metadata.version("highspy"),
        "fxhybrid": metadata.version("fxhybrid"),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": command_line(),
    }


def cpu_model() -> str:
    """Returns the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def command_line() -> str:
    """Returns the command that started this process; ``--json`` is left out, since it only says where records go."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return " ".join((program, *map(shlex.quote, kept)))


def append_record(path: Path | None, record: Record) -> None:
    """Adds one JSON line, so that an interrupted run keeps what it found; a new run gets its header first.

    Files of the checkout are named relative to it.
    """
    if path is None:
        return
    header = run_header()
    known = [old for old in _lines(path) if old.get("part") == HEADER] if path.exists() else []
    with path.open("a", encoding="utf-8") as file:
        for line in (record,) if known[-1:] == [header] else (header, record):
            file.write(json.dumps(line).replace(CHECKOUT, "") + "\n")


def read_headed(path: Path) -> list[tuple[Record, Record]]:
    """Returns every record of a file together with the header of the run that wrote it (empty without one)."""
    found, header = [], {}
    for record in _lines(path):
        if record.get("part") == HEADER:
            header = record
        else:
            found.append((header, record))
    return found


def read_records(path: Path) -> list[Record]:
    """Returns the records that runs wrote to a file, the latest of each case.

    Rows that were transcribed from a printed table are no records of a run, and are left out.
    """
    return latest(record for _, record in read_headed(path) if not record.get("transcribed"))


def latest(records: Iterable[Record]) -> list[Record]:
    """Returns the last record of each case."""
    return list({tuple(record.get(name) for name in CASE): record for record in records}.values())


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
