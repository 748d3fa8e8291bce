"""Documents: links lead somewhere, decisions have a status and stand in the index, versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fxhybrid
from tests.test_layering import FLOORS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
RECORDS = sorted(ROOT.glob("docs/adr/[0-9]*.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_of_code_exist(path: Path) -> None:
    if path.parent.name == "adr" or path.name == "CHANGELOG.md":
        pytest.skip("says what was")
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:fxhybrid|passes|solvers|tests|benchmarks|docs)/[\w./-]+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem[:4])
def test_decision_records_have_status_and_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    number = int(path.stem[:4])
    head = re.match(rf"# ADR {number}: (.+)\n\nStatus: (Proposed|Accepted|Superseded by \[\d+\]\(.+?\)).*\n", text)
    assert head, "see the template in docs/adr/README.md"
    parts = re.findall(r"^## (.+)$", text, re.M)
    assert [p for p in parts if p in ("Context", "Decision", "Consequences")] == ["Context", "Decision", "Consequences"]
    status = re.search(r"^Status: (.*)$", text, re.M)
    assert status
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    assert f"| {number} | [{head[1]}]({path.name}) | {status[1]} |" in index.splitlines()


def test_versions_agree() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changes, re.M)[:2] == ["Unreleased", fxhybrid.__version__]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == fxhybrid.__version__  # type: ignore[index]
    released = re.search(r"^date-released: (.*)$", citation, re.M)
    assert released
    assert f"## [{fxhybrid.__version__}] - {released[1]}" in changes


def test_glossary_rows_are_complete_and_sorted() -> None:
    text = (ROOT / "docs" / "GLOSSARY.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert all(len(row) == 3 and all(row) for row in rows)
    names = [row[0].lower() for row in rows]
    assert names == sorted(names)


def test_every_room_has_a_paragraph() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    described = [name for line in re.findall(r"^\*\*(.+?)\.\*\*", text, re.M) for name in re.findall(r"`(.+?)`", line)]
    assert sorted(described) == sorted(room for floor in FLOORS for room in floor)
