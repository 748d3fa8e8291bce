"""One self-contained HTML file about a plan."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fxhybrid.explain.plot import pyplot

STYLE = """
body { font-family: system-ui, sans-serif; max-width: 85rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } pre { overflow-x: auto; line-height: 1.3; font-size: min(0.68rem, 0.8vw) }
table { border-collapse: collapse }
td, th { padding: 0.2rem 0.8rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
"""


def picture(figure: Any, alt: str) -> str:
    """Returns a figure as an ``img`` element that holds its bytes, and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot().close(figure)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def settings_table(settings: Mapping[str, object]) -> str:
    """Returns names and values as a table."""
    cells = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items()
    )
    return f"<table>{''.join(cells)}</table>"


def write_page(path: str | Path, title: str, sections: Iterable[tuple[str, str]]) -> None:
    """Writes a page.

    Args:
        path: of the file.
        title: in plain text.
        sections: headings in plain text, and what stands below them as HTML.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    text = f"<!doctype html>\n<html><head>{head}</head><body><h1>{html.escape(title)}</h1>\n{body}</body></html>\n"
    Path(path).write_text(text, encoding="utf-8")
