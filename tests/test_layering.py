"""Who may import whom: one table of floors, read from every file's import statements, and tried out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import fxhybrid

ROOT = Path(__file__).parents[1]
# Rooms from the top; one imports rooms on floors below its own only. docs/ARCHITECTURE.md shows the same table.
FLOORS = (
    ("__main__",),
    ("cli", "federated.flower_app"),
    ("federated.flower", "federated.simulation"),
    ("federated.server", "federated.client"),
    ("federated.tasks", "federated"),
    ("federated.memory", "federated.selection", "federated.protocol"),
    ("demo",),
    ("fxhybrid",),
    ("budget_sweep", "integrations"),
    ("api",),
    ("module",),
    ("segments",),
    ("compiler",),
    ("accuracy", "explain"),
    ("devices", "pipeline"),
    ("options", "runtime"),
    ("solvers.portfolio",),
    ("solvers.ilp", "solvers.mps"),
    ("solvers", "passes"),
    ("capture", "ir", "profiling"),
    ("codecs", "ops", "suite"),
    ("codecs.kernels",),
    ("units", "optional_imports"),
    ("errors", "version", "console", "torch_internals"),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = ("errors", "units", "version", "ir", "solvers", "federated.memory", "federated.selection")


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


def test_every_module_has_a_room() -> None:
    assert not {name for name in MODULES if room_of(name) not in ROOMS}
    assert not set(ROOMS) - {room_of(name) for name in MODULES}


def test_a_room_imports_rooms_below_it_only() -> None:
    rooms = {(name, room_of(name), i, room_of(i)) for name, i in own_imports()}
    wrong = [f"{name} imports {i}" for name, room, i, other in rooms if room != other and ROOMS[room] >= ROOMS[other]]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle_of_files() -> None:
    assert not cycles(own_imports())


def test_the_documented_table_is_this_one() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- floors -->\n\n(.*?)\n\n<!-- /floors -->", text, re.S)
    assert table
    lines = [line.split("|")[1] for line in table[1].splitlines()[2:]]
    assert tuple(tuple(re.findall(r"`(.*?)`", line)) for line in lines) == FLOORS


def test_no_module_shadows_the_standard_library() -> None:
    # packages are namespaces of ours (fxhybrid.codecs); a file named as a library module confuses readers and tools
    names = {name: path.stem for name, path in MODULES.items() if path.stem != "__init__"}
    assert not {name for name, stem in names.items() if stem in sys.stdlib_module_names}


def test_no_file_name_twice() -> None:
    # the app's two files are named by Flower
    files = [name.rpartition(".")[2] for name, path in MODULES.items() if path.stem != "__init__"]
    assert {name for name in files if files.count(name) > 1} <= {"client_app", "server_app"}


def test_the_root_stays_small() -> None:
    assert len(list((ROOT / "fxhybrid").glob("*.py"))) <= 14


def test_solvers_and_passes_know_nothing_of_each_other() -> None:
    assert not {name for name in importing("fxhybrid.solvers") if room_of(name) in ("passes", "codecs")}
    assert not {name for name in importing("fxhybrid.passes") if room_of(name).startswith("solvers")}


def test_rooms_without_torch() -> None:
    rooms = tuple(name for room in WITHOUT_TORCH for name in ROOMS if name == room or name.startswith(f"{room}."))
    assert not {name for name in importing("torch") if room_of(name) in rooms}


def loaded(code: str) -> set[str]:
    """Runs code in a fresh process; returns the modules that are loaded then."""
    show = "import sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_rooms_without_torch_run_without_it() -> None:
    names = sorted(
        n for n in MODULES if any(n == f"fxhybrid.{r}" or n.startswith(f"fxhybrid.{r}.") for r in WITHOUT_TORCH)
    )
    assert "torch" not in loaded(f"import {', '.join(names)}")


def test_public_names_are_imported_at_first_use() -> None:
    assert not loaded("import fxhybrid") & {"torch", "numpy", "fxhybrid.api"}
    assert "fxhybrid.api" in loaded("import fxhybrid\nfxhybrid.compile")
    # a submodule of the same name would take the place of the function once somebody imports it
    assert not {f"fxhybrid.{name}" for name in fxhybrid.__all__} & set(MODULES)
    assert all(getattr(fxhybrid, name) is not None for name in fxhybrid.__all__)
    with pytest.raises(AttributeError, match="fronteer"):
        fxhybrid.fronteer  # noqa: B018


@pytest.mark.parametrize("folder", ["passes", "solvers"])
def test_folders_cannot_be_imported_from_the_top(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"import fxhybrid.{folder}" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ImportError")


def test_nothing_outside_imports_the_federated_layer() -> None:
    above = ("fxhybrid.federated", "fxhybrid.cli")
    assert not {name for name in importing("fxhybrid.federated") if not name.startswith(above)}


def test_one_room_knows_flower() -> None:
    assert {room_of(name) for name in importing("flwr")} == {"federated.flower"}
