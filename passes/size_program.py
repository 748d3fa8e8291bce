"""Arithmetic over size symbols, compiled into one Python function that evaluates all of a step's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from fxhybrid.errors import CaptureError
from fxhybrid.torch_internals import PythonPrinter

Sizes = Mapping[str, int]  # by the symbol's name
Values = Sequence[Any]  # what each expression of a program comes to
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class SizeProgram:
    """Collects expressions over size symbols, and compiles them into one function that evaluates all."""

    def __init__(self) -> None:
        self._places: dict[sympy.Basic, int] = {}
        self._integers: dict[int, int] = {}
        self.numbers: list[Any] = []  # at each place, the number as it was given

    def place(self, value: Any) -> int:
        """Returns the position of a number, symbolic or not, among the evaluated ones; adds it if it is new."""
        if type(value) is int:
            if value not in self._integers:
                self._integers[value] = self._place(sympy.Integer(value), value)
            return self._integers[value]
        return self._place(value.node.expr if isinstance(value, SYMBOLIC) else sympy.sympify(value), value)

    def _place(self, expression: sympy.Basic, value: Any) -> int:
        if expression not in self._places:
            self._places[expression] = len(self._places)
            self.numbers.append(value)
        return self._places[expression]

    def compiled(self) -> Callable[[Sizes], Values]:
        """Compiles all expressions; calling the result raises ``KeyError`` if a symbol has no size.

        Raises:
            CaptureError: an expression has no form in Python.
        """
        symbols = sorted({str(symbol) for expression in self._places for symbol in expression.free_symbols})
        printer = PythonPrinter()
        try:
            results = "".join(f"{printer.doprint(expression)}, " for expression in self._places)
            evaluate = eval(f"lambda {', '.join(symbols)}: ({results})", dict(SYMPY_INTERP))
        except (NotImplementedError, SyntaxError) as error:
            raise CaptureError(f"a size of the step cannot be written as Python: {error}") from error
        return lambda sizes: evaluate(*(sizes[name] for name in symbols))
