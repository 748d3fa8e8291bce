"""Arithmetic on symbolic sizes that is done once: a trace asks for the same sums and comparisons all the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any
from unittest.mock import patch

from fxhybrid.torch_internals import SymNode, get_proxy_mode

OPERATIONS = (
    *("add", "sub", "mul", "mod", "int_floordiv", "sym_max", "sym_min"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
)
_SEEN = attrgetter("_expr", "pytype", "_optimized_summation", "_hint")  # what a result depends on
_KNOWN = attrgetter("_replacements_version_counter")  # changes when a symbol is found to be another, or a number


@contextlib.contextmanager
def remembered_arithmetic() -> Iterator[None]:
    """Lets symbolic numbers remember results while a model is traced.

    A result follows from both expressions, their types and what is known of the symbols by then. Where the trace
    records arithmetic as nodes, a result is the node that was recorded first.
    """
    with contextlib.ExitStack() as stack:
        for name in OPERATIONS:
            method = f"_{name}"
            stack.enter_context(patch.object(SymNode, method, _remembering(getattr(SymNode, method))))
        stack.enter_context(patch.object(SymNode, "expr", property(_remembering_own(vars(SymNode)["expr"].fget))))
        stack.enter_context(patch.object(SymNode, "maybe_as_int", _remembering_own(SymNode.maybe_as_int)))
        yield


def _remembering(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    results: dict[Any, Any] = {}

    def remembered(self: Any, other: Any) -> Any:
        env = self.shape_env
        key = *_SEEN(self), *_SEEN(other), id(env), _KNOWN(env), get_proxy_mode()
        if key not in results:
            results[key] = operation(self, other)
        return results[key]

    return remembered


def _remembering_own(operation: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a property of one number that follows from its expression; each walks through that whole."""
    results: dict[Any, Any] = {}

    def remembered(self: Any) -> Any:
        env = self.shape_env
        if env is None:
            return operation(self)
        key = self._expr, id(env), env._replacements_version_counter  # noqa: SLF001  (see _KNOWN)
        if key not in results:
            results[key] = operation(self)
        return results[key]

    return remembered
