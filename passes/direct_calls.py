"""Generates the Python code of a half of a step: boxed, with each operator called without its Python wrapper."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch.fx.graph import PythonCode, _BoxedCodeGen

from fxhybrid.passes.python_bindings import python_binding

_OPERATOR = re.compile(r"\btorch\.ops\.(\w+)\.(\w+)\.(\w+)\(")


class DirectCalls(_BoxedCodeGen):
    """Looks operators up when the code is generated, and not at each call.

    A step of small operators is made of such calls: five attributes to look up and a Python frame each.
    """

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> PythonCode:
        code = super()._gen_python_code(nodes, *args, **kwargs)
        names = dict(code.globals)
        calls = defaultdict(list)
        for node in nodes:
            calls[node.target].append(node)

        def direct(match: re.Match[str]) -> str:
            namespace, name, overload = match.groups()
            operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
            short = f"{namespace}_{name}_{overload}"
            names[short] = python_binding(operator, calls[operator]) or operator._op  # noqa: SLF001  (no public name)
            return f"{short}("

        return replace(code, src=_OPERATOR.sub(direct, code.src), globals=names)
