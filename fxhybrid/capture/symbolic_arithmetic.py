"""Arithmetic on symbolic sizes that is done once: a trace asks for the same sums and comparisons all the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import sympy

from fxhybrid.torch_internals import PROXY, SymNode, dispatch_mode

OPERATIONS = (
    *("add", "sub", "mul", "mod", "int_floordiv", "sym_max", "sym_min"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
)
_SEEN = attrgetter("_expr", "pytype", "_optimized_summation", "_hint")  # what a result depends on
# What is known of the symbols: the counter moves when one is found to be another, or a number.
_KNOWN = attrgetter("shape_env", "shape_env._replacements_version_counter")


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
        stack.enter_context(patch.object(SymNode, "expr", property(_known_expression(vars(SymNode)["expr"].fget))))
        stack.enter_context(patch.object(SymNode, "maybe_as_int", _known_integer(SymNode.maybe_as_int)))
        stack.enter_context(patch.object(SymNode, "wrap_int", _wrapped_once(SymNode.wrap_int)))
        yield


def _remembering(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    results: dict[Any, Any] = {}

    def remembered(self: Any, other: Any) -> Any:
        key = *_SEEN(self), *_SEEN(other), *_KNOWN(self), dispatch_mode(PROXY)
        result = results.get(key)
        if result is None:
            result = results[key] = operation(self, other)
            _expand(result)
        return result

    return remembered


def _expand(number: Any) -> None:
    """Writes a product of sums as a sum, so that equal numbers of bytes are equal expressions."""
    expression = number._expr  # noqa: SLF001
    if expression.is_Mul and any(factor.is_Add for factor in expression.args):
        number._expr = sympy.expand_mul(expression, deep=False)  # noqa: SLF001


def _known_expression(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns what reads a number's expression: as it was made, until something is found of a symbol."""
    results: dict[Any, Any] = {}

    def remembered(self: Any) -> Any:
        if self.shape_env is None:
            return read(self)
        environment, version = _KNOWN(self)
        if not version:
            return self._expr
        key = self._expr, environment, version
        if key not in results:
            results[key] = read(self)
        return results[key]

    return remembered


def _known_integer(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns what reads the integer of a number that is no symbol; sympy walks through the whole expression."""
    results: dict[Any, Any] = {}

    def remembered(self: Any) -> Any:
        expression = self.expr
        if expression not in results:
            results[expression] = read(self)
        return results[expression]

    return remembered


def _wrapped_once(wrap: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    results: dict[Any, Any] = {}

    def remembered(self: Any, number: int) -> Any:
        key = number, type(number), self.shape_env
        if key not in results:
            results[key] = wrap(self, number)
        return results[key]

    return remembered
