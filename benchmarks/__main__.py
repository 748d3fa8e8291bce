"""Lists every benchmark command: ``python -m benchmarks``."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from benchmarks.lib.registry import Command, commands


def main() -> None:
    """Prints the commands, then the studies."""
    found, console = list(commands()), Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table_of("Commands", (c for c in found if not c.is_study)))
    console.print(table_of("Studies: each decided a record of docs/adr", (c for c in found if c.is_study)))


def table_of(title: str, chosen: Iterable[Command]) -> Table:
    """Builds a table with a row per command."""
    table = Table(title=title, title_justify="left")
    for name in ("python -m", "what it does", "minutes, about", "needs"):
        table.add_column(name, justify="right" if name.startswith("minutes") else "left")
    for command in chosen:
        minutes = f"{command.minutes:g}" if command.minutes >= 1 else "under 1"
        table.add_row(command.name, command.shows, minutes, command.needs)
    return table


if __name__ == "__main__":
    main()
