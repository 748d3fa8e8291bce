"""Fingerprint: one hash for a graph's structure, shapes, types and roles, whatever its nodes are called."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxhybrid.capture.joint_graph import InputKind, JointGraph, OutputKind


def fingerprint(joint: JointGraph) -> str:
    """Computes a hex digest that is equal for graphs that any plan fits alike.

    Size inputs count for nothing: a graph made concrete from one with symbolic sizes reads none of them any more.
    """
    digest = hashlib.sha256()
    pairs = list(zip(joint.placeholders, joint.inputs, strict=True))
    sizes = {node for node, role in pairs if role.kind is InputKind.SIZE}
    kept = [position for position, (node, _) in enumerate(pairs) if node not in sizes]
    position_of = {position: i for i, position in enumerate(kept)}
    outputs = zip(joint.output_nodes, joint.outputs, strict=True)
    results = [(node, role) for node, role in outputs if role.kind is OutputKind.USER_OUTPUT or role.of in position_of]
    nodes = [node for node in joint.module.graph.nodes if node not in sizes]
    number = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        target = node.target if node.op == "call_function" else ""
        arguments = _text((node.args, node.kwargs), number) if node.op not in ("placeholder", "output") else ""
        if node.op == "output":
            arguments = _text((([result for result, _ in results],), node.kwargs), number)
        digest.update(f"{node.op}|{target}|{arguments}|{_text(node.meta.get('val'), number)}\n".encode())
    for role in (joint.inputs[position] for position in kept):
        digest.update(f"{role.kind.value}|{role.mutated}\n".encode())
    for _, output in results:
        of = output.of if output.kind is OutputKind.USER_OUTPUT else position_of[output.of]
        digest.update(f"{output.kind.value}|{of}\n".encode())
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
