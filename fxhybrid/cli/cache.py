"""What is kept on disk between processes: listed and removed."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from fxhybrid.codecs.kernels.cache_folder import cache_folder
from fxhybrid.units import format_bytes

KINDS = {"profile-": "times of operators", "plans-": "plans and gradient errors", "kernels-": "compiled kernels"}


def kept_files() -> dict[str, list[Path]]:
    """Finds the files of each kind; empty where nothing is kept."""
    folder = cache_folder()
    return {} if folder is None else {kind: sorted(folder.glob(f"{prefix}*")) for prefix, kind in KINDS.items()}


def cache_table() -> Table:
    """Lists what is kept, by kind."""
    table = Table(title=f"kept in {cache_folder() or 'no folder: there is no home'}")
    for name in ("what", "files", "size", "last written"):
        table.add_column(name)
    for kind, files in kept_files().items():
        stats = [path.stat() for path in files]
        last = max((stat.st_mtime for stat in stats), default=None)
        when = "never" if last is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        table.add_row(kind, str(len(files)), format_bytes(sum(stat.st_size for stat in stats)), when)
    return table


def clear_cache() -> str:
    """Removes what is kept, and says what that was."""
    files = [path for found in kept_files().values() for path in found]
    size_bytes = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink(missing_ok=True)
    return f"removed {len(files)} files, {format_bytes(size_bytes)}"
