"""The list of benchmark commands, and files of records."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as listing
from benchmarks.lib.registry import commands
from benchmarks.lib.results import append_record, read_headed, read_records

ROOT = Path(__file__).parents[1]


def test_every_module_with_a_main_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    # by their text, not by the registry's own reading of them
    files = [p for p in (ROOT / "benchmarks").rglob("*.py") if "\ndef main(" in p.read_text(encoding="utf-8")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files} - {"benchmarks.__main__"}
    assert {command.name for command in commands()} == names
    listing.main()
    assert names <= set(re.findall(r"benchmarks\.[\w.]+", capsys.readouterr().out))


def test_commands_begin_once_all_is_defined() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "\ndef " not in text.partition('\nif __name__ == "__main__":')[2], path.name


def test_studies_say_which_decision_they_made() -> None:
    for command in commands():
        number = re.match(r"Decides ADR (\d+): ", command.shows)
        assert bool(number) == command.is_study, command.name
        if number:
            assert list((ROOT / "docs" / "adr").glob(f"{int(number[1]):04}-*.md")), command.name


def test_commands_say_what_they_do() -> None:
    for command in commands():
        assert importlib.util.find_spec(command.name)
        assert re.match(r"[A-Z][a-z]+s ", command.shows), f"{command.name}: {command.shows}"
        assert command.minutes > 0


def test_records_are_headed_by_machine_versions_and_command(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first = {"model": "a", "part": "reach", "key": None, "x": 1}
    for record in (first, first | {"x": 2}, {"model": "b", "part": "reach", "key": 0.5}):
        append_record(path, record)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 3  # one header for one run
    header, record = read_headed(path)[0]
    assert record == first
    assert {"cpu", "cores", "threads", "torch", "python", "fxhybrid", "date", "command"} <= set(header)
    assert [r.get("x") for r in read_records(path)] == [2, None]  # the last one of the same case


def test_records_name_files_of_the_checkout_relative_to_it(tmp_path: Path) -> None:
    append_record(tmp_path / "runs.jsonl", {"model": "a", "text": f"at {Path(__file__).resolve()}:1"})
    assert read_records(tmp_path / "runs.jsonl")[0]["text"] == "at tests/test_benchmarks.py:1"
