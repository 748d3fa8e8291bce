"""JSON text of values that are stored or sent, read back as the value or as a named error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fxhybrid.errors import FxHybridError

T = TypeVar("T")


def to_json(raw: Mapping[str, Any], *, version: int | None = None) -> str:
    """Writes plain values as JSON text, with the version of their format if they have one."""
    return json.dumps(raw) if version is None else json.dumps({"format": version, **raw}, indent=1)


def from_json(
    text: str,
    build: Callable[[dict[str, Any]], T],
    error: type[FxHybridError],
    message: str,
    *,
    version: int | None = None,
) -> T:
    """Builds a value from the plain ones that ``to_json`` wrote.

    Args:
        text: JSON of an object.
        build: makes the value; may raise what wrong names and types lead to.
        error: class of the error for a text that is something else.
        message: of that error; the cause is added.
        version: of the format; None where it has none.

    Raises:
        FxHybridError: of the class ``error``: the text is something else, is cut off, or is of another version.
    """
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise TypeError(f"it is a {type(raw).__name__}, not an object")
        if version is not None and raw.pop("format") != version:
            raise ValueError(f"its format is not {version}")
        return build(raw)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as cause:
        raise error(f"{message}: {cause!r}") from cause
