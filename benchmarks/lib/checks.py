"""Acceptance checks, each judged from the records of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """One bar: what is asked, what was found, and whether that is enough (None: nothing was measured)."""

    name: str
    asked: str
    found: str
    met: bool | None


def bars_table(bars: Iterable[Bar]) -> Table:
    """One row per bar."""
    table = Table(title="What it must show")
    for name in ("bar", "asked", "found", "met"):
        table.add_column(name)
    words = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "not measured"}
    for bar in bars:
        table.add_row(bar.name, bar.asked, bar.found, words[bar.met])
    return table


def bar_of(name: str, asked: str, values: dict[str, float], limit: float, form: str) -> Bar:
    """A bar on the largest of ``values``; names those over it."""
    if not values:
        return Bar(name, asked, "", None)
    worst = max(values, key=lambda key: values[key])
    over = [f"{key} {form.format(value)}" for key, value in values.items() if value > limit]
    found = ", ".join(over) if over else f"largest: {form.format(values[worst])} ({worst})"
    return Bar(name, asked, found, not over)
