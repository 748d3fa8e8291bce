"""What people see while and after something runs: progress, stages in the log, and tables as text."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # rich is imported when something is shown, not with fxhybrid
    from rich.console import Console, RenderableType
    from rich.progress import Progress

T = TypeVar("T")
LONG_S = 2.0
MOST_COLUMNS = 400  # of a table in HTML
LOG = logging.getLogger("fxhybrid")
COUNT = "{task.completed}/{task.total}"


def progress_bar(text: str = COUNT, *, console: Console | None = None) -> Progress:
    """Makes a bar that vanishes when done; nothing is shown where there is no terminal.

    Args:
        text: template of what stands behind the bar.
        console: where to; None for the error stream.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn(text), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Yields the items, with a bar once they have taken ``LONG_S``."""
    start = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(items), visible=False)
        for item in items:
            yield item
            bar.update(task, advance=1, visible=time.monotonic() - start > LONG_S)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Logs a stage of planning and its seconds when it is over: logger ``"fxhybrid"``, level INFO.

    Python's random numbers go on from where they were: libraries that a stage imports first draw some (``rich`` does).
    """
    start, generator = time.perf_counter(), random.getstate()
    try:
        yield
    finally:
        random.setstate(generator)
    LOG.info("%s: %.2f s", name, time.perf_counter() - start)


def as_text(table: RenderableType, width: int = 110) -> str:
    """Renders a table as plain text of at most ``width`` columns."""
    from rich.console import Console

    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def as_html(table: RenderableType) -> str:
    """Renders a table as an HTML fragment, for notebooks and pages: as wide as it is, since these can be scrolled."""
    from rich.console import Console

    console = Console(width=MOST_COLUMNS, record=True, file=io.StringIO())
    console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
