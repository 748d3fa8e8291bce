"""Fingerprint: one hash for a graph's structure, shapes, types and roles, whatever its nodes are called."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxhybrid.capture.joint_graph import JointGraph


def fingerprint(joint: JointGraph) -> str:
    """Computes a hex digest that is equal for graphs that any plan fits alike."""
    digest = hashlib.sha256()
    number = {node: i for i, node in enumerate(joint.module.graph.nodes)}
    for node in joint.module.graph.nodes:
        target = node.target if node.op == "call_function" else ""
        arguments = _text((node.args, node.kwargs), number) if node.op != "placeholder" else ""
        digest.update(f"{node.op}|{target}|{arguments}|{_text(node.meta.get('val'), number)}\n".encode())
    for role in joint.inputs:
        digest.update(f"{role.kind.value}|{role.mutated}\n".encode())
    for output in joint.outputs:
        digest.update(f"{output.kind.value}|{output.of}\n".encode())
    return digest.hexdigest()[:32]


def _text(value: Any, number: Mapping[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{number[value]}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{tuple(value.stride())}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_text(v, number) for v in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{_text(v, number)}' for k, v in value.items())}}}"
    return repr(value)
