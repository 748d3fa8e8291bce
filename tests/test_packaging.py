"""The checkout's shape: what stands where, and what the metadata promises."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxhybrid

ROOT = Path(__file__).parents[1]
TOP = {
    "fxhybrid",
    "passes",
    "solvers",
    "benchmarks",
    "tests",
    "docs",
    "examples",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
}


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_top_level_is_as_promised() -> None:
    names = {path.split("/")[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} - TOP == set()
    assert {name for name in TOP if not (ROOT / name).exists()} == set()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["passes", "solvers"])
def test_links_are_relative_links(name: str) -> None:
    link = ROOT / "fxhybrid" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


def test_pyproject_holds_only_the_build_system_and_ruff() -> None:
    parsed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(parsed) <= {"build-system", "tool"}
    assert set(parsed.get("tool", {})) <= {"ruff"}


def test_extras_and_dependencies() -> None:
    config = setup_cfg()
    needed = config["options"]["install_requires"].split()
    assert "torch>=2.13,<2.15" in needed
    extras = {name: set(text.split()) for name, text in config["options.extras_require"].items()}
    assert extras["demo"] <= extras["test"], "the test extra includes the demo's packages"
    assert {name for name, needed in extras.items() if "scikit-learn>=1.4" in needed} == {"demo", "test", "federated"}
    assert config["options"]["python_requires"] == ">=3.11"


def test_entry_points_lead_somewhere() -> None:
    for group in setup_cfg()["options.entry_points"].values():
        for line in group.strip().splitlines():
            module, _, name = line.split("=")[1].strip().partition(":")
            assert callable(getattr(importlib.import_module(module), name)), line


def test_version() -> None:
    assert fxhybrid.__version__ == importlib.metadata.version("fxhybrid")


def test_public_names_exist_and_have_docstrings() -> None:
    for name in fxhybrid.__all__:
        value = getattr(fxhybrid, name)
        assert isinstance(value, str) or value.__doc__, name


def test_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e '.[demo]' && fxhybrid demo" in text
    command = "pip install -c .ci/constraints.txt -e '.[test]' && pytest -n auto --dist loadfile"
    assert command in text
    assert command.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_public_names_are_listed_before_their_first_use() -> None:
    code = "import fxhybrid; print(sorted(set(fxhybrid.__all__) - set(dir(fxhybrid))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_importing_loads_neither_solvers_nor_displays() -> None:
    names = ("pulp", "highspy", "rich", "transformers", "matplotlib")
    code = f"import sys, fxhybrid; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


EACH_ALONE = """
import importlib, os, sys, traceback
import fxhybrid.torch_internals  # takes long, and registers nothing of ours
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(f"do not import alone: {failed}" if failed else 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each module from the start takes minutes")
def test_each_pass_imports_alone() -> None:
    """Operators of our own that a module looks up are registered by what it imports itself."""
    names = [f"fxhybrid.passes.{path.stem}" for path in sorted((ROOT / "passes").glob("[a-z]*.py"))]
    assert "fxhybrid.passes.in_place" in names
    done = subprocess.run([sys.executable, "-c", EACH_ALONE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
