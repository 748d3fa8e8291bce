"""Calls what follows the end of a graph when the function in which the graph ended is over.

Dynamo splits a function where a graph must end, and the first part calls the second. Every part so waits for all that
follow and holds what it was given: inputs of all graphs live until the last one has run, where eager, which binds one
name to a new value, holds the newest one. Here a part returns the call in place of making it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType
from typing import Any

from fxhybrid.torch_internals import create_call_function, create_instruction, skip_code, transform_code_object

_SECOND_PART = "torch_dynamo_resume_in"  # begins the names of Dynamo's second parts
_NULL_ABOVE = sys.version_info >= (3, 13)  # whether a call's NULL lies above what is called on the stack


@dataclass(frozen=True, eq=False)
class _Call:
    """Is a call to be made by ``run_parts``."""

    function: Callable[..., Any]
    arguments: list[Any]


def run_parts(function: Callable[..., Any], arguments: list[Any]) -> Any:
    """Calls a function, and then what its parts return to be called; empties ``arguments``."""
    taken = arguments.copy()
    arguments.clear()
    while True:
        result = function(*taken)
        if type(result) is not _Call:
            return result
        function, taken = result.function, result.arguments
        del result


def _call_or_return(function: Callable[..., Any], arguments: Any) -> Any:
    """Calls what a converted part ends with, or returns the call where ``run_parts`` is to get it."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_name.startswith(_SECOND_PART):
        return function(*arguments)
    before = sys._getframe(1).f_back  # noqa: SLF001 (the documented way to a caller)
    if before is None or before.f_code is not _RUN_PARTS:
        return run_parts(function, arguments)
    taken = arguments.copy()
    arguments.clear()  # the converted part still holds the list
    return _Call(function, taken)


_RUN_PARTS: CodeType = run_parts.__code__
for _code in (_RUN_PARTS, _call_or_return.__code__):
    skip_code(_code)


def returning_calls(converted: CodeType) -> CodeType:
    """Lets the calls that converted code ends with be returned.

    Args:
        converted: by Dynamo.
    """
    constants = tuple(c if _is_hashable(c) else _StandIn() for c in converted.co_consts)
    code, _ = transform_code_object(converted.replace(co_consts=constants), _edit)
    return code.replace(co_consts=(*converted.co_consts, *code.co_consts[len(constants) :]))


class _StandIn:
    """Stands for a constant by which code cannot be looked up in a cache."""


def _is_hashable(constant: Any) -> bool:
    try:
        hash(constant)
    except TypeError:
        return False
    return True


def _edit(instructions: list[Any], _: dict[str, Any]) -> None:
    last_calls = [
        i
        for i, (call, following) in enumerate(pairwise(instructions))
        if call.opname == "CALL_FUNCTION_EX" and call.arg == 0 and following.opname == "RETURN_VALUE"
    ]
    for i in reversed(last_calls):
        # NULL, function, list (or function, NULL, list) -> NULL, _call_or_return, function, list
        below = 4 if _NULL_ABOVE else 3
        instructions[i : i + 1] = [
            create_instruction("LOAD_CONST", argval=_call_or_return),
            create_instruction("SWAP", arg=below),
            create_instruction("SWAP", arg=2),
            *create_call_function(2, False),
        ]
