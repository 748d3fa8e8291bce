"""Tables in README.md and docs/ come from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.lib.registry import commands
from benchmarks.lib.results import RESULTS, read_headed
from benchmarks.tables import MARKED, TABLES, documents, markdown

MIB = 1 << 20
HEADER = {"part": "header", "cpu": "Z80", "cores": 2, "threads": 1, "torch": "2.13.0", "command": "python -m x"}


def write(path: Path, *records: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_documents_hold_what_the_results_say() -> None:
    tables.main(["--check"])  # raises SystemExit where one differs: run python -m benchmarks.tables


def test_every_table_is_in_one_document_and_every_file_in_a_table() -> None:
    found = [match["name"] for path in documents() for match in MARKED.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(TABLES)
    used = {table.results for table in TABLES.values()}
    commands_of = {command.name.rpartition(".")[2] for command in commands()}
    assert used <= {path.stem for path in RESULTS.glob("*.jsonl")} <= used | commands_of  # studies have no table here


def test_every_committed_record_says_where_it_comes_from() -> None:
    for path in RESULTS.glob("*.jsonl"):
        for header, record in read_headed(path):
            assert header["command"].startswith("python -m benchmarks"), path
            assert record.get("transcribed") or {"cpu", "torch", "fxhybrid", "date"} <= set(header), path
        assert not re.search(r"/\S*/benchmarks/", path.read_text(encoding="utf-8")), f"{path} names somebody's folders"


def test_a_wrong_figure_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "README.md"
    wrong.write_text((tables.ROOT / "README.md").read_text(encoding="utf-8").replace("MiB |", "GiB |", 1), "utf-8")
    monkeypatch.setattr(tables, "documents", lambda: [wrong])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"README\.md: tables differ"):
        tables.main(["--check"])
    tables.main([])  # writes it right again
    tables.main(["--check"])


def test_records_of_a_run_replace_transcribed_rows(tmp_path: Path) -> None:
    old = [HEADER | {"transcribed": True}, {"transcribed": True, "table": "suite", "cells": ["MLP", *"abcdef"]}]
    head = {"model": "mlp", "size": "full", "key": None}
    # smallest peak 50 of 100 MiB, a budget 2 % above it
    sizes = {"eager_peak_bytes": 100 * MIB, "minimum_bytes": 50 * MIB, "minimum_share": 0.5}
    sizes |= {"budget_bytes": 51 * MIB, "measured_bytes": int(50.5 * MIB)}
    reach = head | {"part": "reach", "compile_s": 2.4} | sizes
    cheap = head | {"part": "cheap", "ratio": 1.25, "share": 0.5, "compile_s": 2.4}
    path = tmp_path / "suite.jsonl"
    write(path, *old)
    assert "| MLP | a | b | c | d | e | f |" in markdown("suite", TABLES["suite"], tmp_path)
    write(path, *old, HEADER, cheap, reach | {"minimum_bytes": 1}, reach)  # the later record of a case counts
    text = markdown("suite", TABLES["suite"], tmp_path)
    assert text.splitlines()[2:] == [
        "| MLP | 100 MiB | 50 MiB (0.50) | 51.0 MiB | 50.5 MiB | 1.25 at 0.50 | 2 s |",
        "",
        "Printed by `python -m x` on Z80, cores: 2, threads: 1, torch 2.13.0.",
    ]


def test_solver_rows_from_records(tmp_path: Path) -> None:
    # MPS / ILP with 0.1 % of the step (1 s) on both: (0.011 + 0.001) / (0.009 + 0.001) = 1.2, and 1
    head = {"model": "bert", "part": "corpus", "nodes": 279, "step_s": 1.0, "frontier_s": 1.44, "quick_solve_s": 0.5}
    first = head | {"key": 0.0, "mps_s": 0.011, "added_s": 0.009, "quick_gap": 0.02, "long_gap": 0.01}
    second = head | {"key": 0.2, "mps_s": 0.009, "added_s": 0.009, "quick_gap": 0.0, "long_gap": 0.0}
    write(tmp_path / "solvers.jsonl", HEADER, first, second)
    text = markdown("solvers, corpus", TABLES["solvers, corpus"], tmp_path)
    assert text.splitlines()[2] == "| BERT | 279 | 1.4 | 1.095 | 1.200 | 2.0 % | 1.0 % | 0.5 |"  # sqrt(1.2) = 1.095
