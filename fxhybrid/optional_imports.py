"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from types import ModuleType

from fxhybrid.errors import InvalidArgument

_PACKAGES = {"sklearn": "scikit-learn"}


def require(module: str, purpose: str, *, extra: str = "demo") -> ModuleType:
    """Imports ``module``, which ``purpose`` needs and ``extra`` installs.

    Raises:
        InvalidArgument: the package is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module.split(".")[0], module.split(".")[0])
        raise InvalidArgument(f"{purpose} needs the package {package}: pip install 'fxhybrid[{extra}]'") from error
