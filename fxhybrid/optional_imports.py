"""Packages that only some commands need, and functions that users name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

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


def load_function(text: str) -> Callable[..., Any]:
    """Imports the function that ``package.module:function`` names; the current folder is searched, too.

    Raises:
        InvalidArgument: there is none.
    """
    module_name, _, name = text.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InvalidArgument(f"cannot import {module_name!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidArgument(f"module {module_name!r} has no function {name!r}")
    return function  # type: ignore[no-any-return]
