"""Who may import whom: one table of floors, read from every file's import statements, and tried out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
# Rooms from the top; most of them are yet to be moved into.
FLOORS = (
    ("cli", "federated.flower_app"),
    ("federated.flower", "federated.simulation"),
    ("federated.server", "federated.client"),
    ("federated.tasks", "federated"),
    ("federated.memory", "federated.selection", "federated.protocol"),
    ("demo",),
    ("fxhybrid",),
    ("frontier", "dynamo_backend"),
    ("api",),
    ("module",),
    ("compiler",),
    ("accuracy",),
    ("devices", "pipeline"),
    ("options", "runtime"),
    ("solvers.portfolio",),
    ("solvers.ilp", "solvers.mps"),
    ("solvers", "passes"),
    ("capture", "ir", "profiling"),
    ("codecs", "ops", "suite"),
    ("codecs.kernels",),
    ("units", "optional_imports"),
    ("errors", "version", "console"),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = ("errors", "version", "solvers", "federated.memory", "federated.selection")


def modules() -> dict[str, Path]:
    """Every module of the package by its name; the links are left out, what they lead to is not."""
    found = {}
    for folder, prefix in (("fxhybrid", "fxhybrid"), ("passes", "fxhybrid.passes"), ("solvers", "fxhybrid.solvers")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fxhybrid" and parts[0] in ("passes", "solvers"):
                continue
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


IMPORTS = {name: set(imports(path)) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """The longest room name that ``module`` is in."""
    name = module.removeprefix("fxhybrid.")
    while name not in ROOMS and "." in name:
        name = name.rpartition(".")[0]
    return name


def importing(package: str) -> set[str]:
    """Modules that import ``package`` or something in it."""
    return {name for name, found in IMPORTS.items() if any(i == package or i.startswith(f"{package}.") for i in found)}


def cycles(edges: Iterator[tuple[str, str]]) -> list[list[str]]:
    """Circles of imports, each as the names on it."""
    return [sorted(found) for found in nx.strongly_connected_components(nx.DiGraph(edges)) if len(found) > 1]


def own_imports() -> Iterator[tuple[str, str]]:
    """Each import of one module of the package by another."""
    yield from ((name, i) for name, found in IMPORTS.items() for i in found if i in MODULES and i != name)


def test_solvers_and_passes_know_nothing_of_each_other() -> None:
    assert not {name for name in importing("fxhybrid.solvers") if room_of(name) in ("passes", "codecs")}
    assert not {name for name in importing("fxhybrid.passes") if room_of(name).startswith("solvers")}


def test_rooms_without_torch() -> None:
    rooms = tuple(name for room in WITHOUT_TORCH for name in ROOMS if name == room or name.startswith(f"{room}."))
    assert not {name for name in importing("torch") if room_of(name) in rooms}


def test_solvers_run_without_torch() -> None:
    # The package's own __init__ imports torch, so a stub with the same search path stands in for it.
    rooms = ("errors", "problem", "plan", "schedule", "timeline", "units", "ir", "solvers")
    names = sorted(n for n in MODULES if any(n == f"fxhybrid.{r}" or n.startswith(f"fxhybrid.{r}.") for r in rooms))
    code = f"""
import importlib, sys, types
stub = types.ModuleType("fxhybrid")
stub.__path__ = [{str(ROOT / "fxhybrid")!r}]
sys.modules["fxhybrid"] = stub
sys.modules["torch"] = None
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["passes", "solvers"])
def test_folders_cannot_be_imported_from_the_top(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"import fxhybrid.{folder}" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ImportError")


def test_nothing_outside_imports_the_federated_layer() -> None:
    above = ("fxhybrid.federated", "fxhybrid.cli.main")
    assert not {name for name in importing("fxhybrid.federated") if not name.startswith(above)}
