"""Who may import whom: read from every file's import statements, and tried out where that is not enough."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = ("errors", "problem", "plan", "schedule", "timeline", "version")
JOINS = {"fxhybrid.compiler"}
ABOVE_COMPILER = {
    "fxhybrid.api",
    "fxhybrid.module",
    "fxhybrid.frontier",
    "fxhybrid.report",
    "fxhybrid.drift",
    "fxhybrid.cli",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name; the links are left out, what they lead to is not."""
    found = {}
    for folder, prefix in (
        ("fxhybrid", "fxhybrid"),
        ("passes", "fxhybrid.passes"),
        ("solvers", "fxhybrid.solvers"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fxhybrid" and parts[0] in ("passes", "solvers"):
                continue
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()
IMPORTS = {name: set(imports(path)) for name, path in MODULES.items()}


def importing(prefix: str) -> set[str]:
    """Modules that import ``prefix`` or something in it."""
    return {name for name, found in IMPORTS.items() if any(i == prefix or i.startswith(f"{prefix}.") for i in found)}


def test_all_folders_are_seen() -> None:
    assert {"fxhybrid.api", "fxhybrid.passes.rewrite", "fxhybrid.solvers.mps", "fxhybrid.codecs.base"} <= set(MODULES)


def test_passes_do_not_import_solvers() -> None:
    assert not {name for name in importing("fxhybrid.solvers") if name.startswith("fxhybrid.passes")}


def test_codecs_import_neither() -> None:
    either = importing("fxhybrid.solvers") | importing("fxhybrid.passes")
    assert not {name for name in either if name.startswith("fxhybrid.codecs")}


def test_solvers_import_only_the_plain_modules() -> None:
    allowed = {f"fxhybrid.{name}" for name in PLAIN}
    for name, found in IMPORTS.items():
        if name.startswith("fxhybrid.solvers"):
            own = {i for i in found if i.startswith("fxhybrid") and not i.startswith("fxhybrid.solvers")}
            strangers = {i for i in own if not any(i == a or i.startswith(f"{a}.") for a in allowed)}
            assert not strangers, f"{name} imports {strangers}"


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_import_plain_modules_only(name: str) -> None:
    own = {i for i in IMPORTS[f"fxhybrid.{name}"] if i.startswith("fxhybrid.")}
    assert {i.split(".")[1] for i in own} <= set(PLAIN)


def test_no_torch_below_the_passes() -> None:
    with_torch = importing("torch")
    assert not {name for name in with_torch if name.startswith("fxhybrid.solvers")}
    assert not with_torch & {f"fxhybrid.{name}" for name in PLAIN}


def test_solvers_run_without_torch() -> None:
    # The package's own __init__ imports torch, so a stub with the same search path stands in for it.
    solvers = sorted(name for name in MODULES if name.startswith("fxhybrid.solvers"))
    plain = [f"fxhybrid.{name}" for name in PLAIN]
    code = f"""
import importlib, sys, types
stub = types.ModuleType("fxhybrid")
stub.__path__ = [{str(ROOT / "fxhybrid")!r}]
sys.modules["fxhybrid"] = stub
sys.modules["torch"] = None
for name in {plain + solvers!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_module_joins_passes_and_solvers() -> None:
    # prepare holds the stages before solving, the others run them; whoever has these and solvers joins both
    assert not importing("fxhybrid.passes") & {n for n in importing("fxhybrid.solvers") if "solvers." not in n}
    graph_side = set().union(*(importing(f"fxhybrid.{name}") for name in ("prepare", "calibration", "within_error")))
    assert graph_side & importing("fxhybrid.solvers") == JOINS


def test_only_the_api_imports_the_joining_module() -> None:
    assert importing("fxhybrid.compiler") <= ABOVE_COMPILER


def test_nothing_below_imports_the_commands() -> None:
    for command in ("fxhybrid.cli", "fxhybrid.demo"):
        assert not {n for n in importing(command) if not n.startswith(("fxhybrid.cli", "fxhybrid.demo"))}


@pytest.mark.parametrize("folder", ["passes", "solvers"])
def test_folders_cannot_be_imported_from_the_top(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"import fxhybrid.{folder}" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ImportError")


def test_memory_forecast_and_selection_run_without_torch() -> None:
    # a device reports its memory, and a server plans rounds, before either needs torch
    light = ("history", "predictor", "readings", "recorder", "selection", "selectors", "traces")
    names = [f"fxhybrid.federated.{name}" for name in light]
    assert set(names) <= set(MODULES)
    for name in names:
        strangers = {i for i in IMPORTS[name] if i.startswith("fxhybrid.") and not i.startswith("fxhybrid.federated")}
        assert {i.split(".")[1] for i in strangers} <= {"errors"}, name
    assert not importing("torch") & set(names)


def test_nothing_outside_imports_the_federated_layer() -> None:
    above = ("fxhybrid.federated", "fxhybrid.cli")
    assert not {name for name in importing("fxhybrid.federated") if not name.startswith(above)}


def test_one_module_knows_flower() -> None:
    assert importing("flwr") == {"fxhybrid.federated.flower"}
