"""Acceptance checks, each computed from the records of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Check:
    """Holds what one check asks, what was found, and whether that is enough (None: nothing was measured)."""

    name: str
    asked: str
    found: str
    met: bool | None


def checks_table(checks: Iterable[Check]) -> Table:
    """Builds the table of all checks, a row each."""
    table = Table(title="Acceptance checks")
    for name in ("check", "asked", "found", "met"):
        table.add_column(name)
    words = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "not measured"}
    for check in checks:
        table.add_row(check.name, check.asked, check.found, words[check.met])
    return table


def check_of(name: str, asked: str, values: dict[str, float], limit: float, form: str) -> Check:
    """Checks the largest of ``values`` against ``limit``; names those over it."""
    if not values:
        return Check(name, asked, "", None)
    worst = max(values, key=lambda key: values[key])
    over = [f"{key} {form.format(value)}" for key, value in values.items() if value > limit]
    found = ", ".join(over) if over else f"largest: {form.format(values[worst])} ({worst})"
    return Check(name, asked, found, not over)
