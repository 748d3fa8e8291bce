"""The list of all benchmark commands, read from the files without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1]


@dataclass(frozen=True)
class Command:
    """Describes one module with a ``main``.

    Attributes:
        name: of the module, as ``python -m`` takes it.
        shows: first line of its docstring.
        minutes: about how long it runs with default options, on two cores.
        needs: packages or systems beyond the installed requirements.
    """

    name: str
    shows: str
    minutes: float
    needs: str

    @property
    def is_study(self) -> bool:
        """Whether it decides an architecture decision record rather than measures the product."""
        return self.name.startswith("benchmarks.studies.")


def commands() -> Iterator[Command]:
    """Yields every module under ``benchmarks/`` that has a ``main``.

    Raises:
        ValueError: a module lacks a docstring, ``MINUTES`` or ``NEEDS``.
    """
    for path in sorted(FOLDER.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if has_main and path.stem != "__main__":
            yield _command(".".join(path.relative_to(FOLDER.parent).with_suffix("").parts), tree)


def _command(name: str, tree: ast.Module) -> Command:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    constants = {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in assigned}
    lines = (ast.get_docstring(tree) or "").splitlines()
    minutes, needs = constants.get("MINUTES"), constants.get("NEEDS")
    if not lines or not isinstance(minutes, int | float) or not isinstance(needs, str):
        raise ValueError(f"{name} needs a docstring and the constants MINUTES (a number) and NEEDS (text)")
    return Command(name, lines[0], minutes, needs)
