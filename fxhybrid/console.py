"""Progress on a terminal's error stream, only for work that takes long."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")
LONG_S = 2.0


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar once they have taken ``LONG_S``; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    start = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=len(items), visible=False)
        for item in items:
            yield item
            bar.update(task, advance=1, visible=time.monotonic() - start > LONG_S)
