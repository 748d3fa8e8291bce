"""Says where files are kept that are rebuilt where they are gone."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Returns ``$XDG_CACHE_HOME/fxhybrid``, by default ``~/.cache/fxhybrid``; None where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification ignores others
        return Path(given, "fxhybrid")
    try:
        return Path.home() / ".cache" / "fxhybrid"
    except RuntimeError:
        return None
