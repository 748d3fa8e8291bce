"""Budgets as people write them, and the bytes that a step cannot do without."""

from __future__ import annotations

import math
import re
from enum import Enum

from fxhybrid.errors import InvalidArgument


class NamedBudget(Enum):
    """Lists the budgets that are found rather than given."""

    AUTO = "auto"
    SMALLEST = "smallest"


Budget = int | float | str | NamedBudget
CheckedBudget = int | float | NamedBudget
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_HELP = (
    'give bytes (int), text such as "512MiB", a float in (0, 1] or text such as "80%" as a share of the save-all peak'
)
_NAMES = '"auto" for what is free now, or "smallest" for the least that a plan takes'


def check_budget(budget: Budget) -> CheckedBudget:
    """The budget as bytes (int), as a share in (0, 1] (float), or by its name.

    Raises:
        InvalidArgument: not a budget; says what one looks like.
    """
    if isinstance(budget, NamedBudget) or budget in [named.value for named in NamedBudget]:
        return NamedBudget(budget)
    try:
        return check_size(budget)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error}, {_NAMES}") from None


def check_size(budget: Budget) -> int | float:
    """The budget as bytes (int) or as a share in (0, 1] (float).

    Raises:
        InvalidArgument: neither of them; says what they look like.
    """
    if isinstance(budget, (bool, NamedBudget)) or not isinstance(budget, (int, float, str)):
        raise InvalidArgument(f"budget is {budget!r}; {_HELP}")
    if isinstance(budget, str):
        return _parse_share(budget) if budget.rstrip().endswith("%") else _parse_bytes(budget)
    if isinstance(budget, float):
        if not math.isfinite(budget) or not 0 < budget <= 1:
            raise InvalidArgument(f"budget is {budget!r}, but a float must be in (0, 1]; {_HELP}")
        return budget
    if budget <= 0:
        raise InvalidArgument(f"budget is {budget} bytes, but it must be positive; {_HELP}")
    return budget


def _parse_share(text: str) -> float:
    try:
        share = float(text.rstrip()[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InvalidArgument(f"budget is {text!r}, but a share must be above 0% and at most 100%; {_HELP}")
    return share


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise InvalidArgument(f"budget is {text!r}; units are {', '.join(u for u in _UNITS if u)}; {_HELP}")
    n_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    if n_bytes <= 0:
        raise InvalidArgument(f"budget is {text!r}, which is no positive number of bytes; {_HELP}")
    return n_bytes


def check_bytes(name: str, value: object) -> int:
    """``value`` if it is a whole number of bytes of at least 0, else InvalidArgument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"{name} is {value!r}; it must be a whole number of bytes of at least 0")
    return value


def format_bytes(n_bytes: float) -> str:
    """A byte count as people read it: ``format_bytes(3 << 20) == "3.0 MiB"``."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
