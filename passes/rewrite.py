"""Rewrite: one new joint graph that carries out a schedule, instruction by instruction.

Nodes named ``compress_*``, ``decompress_*`` and ``recompute_*`` are new; all others are copies. Views follow
their base: each is written again right before a reader that needs it, in the half of the step where it is read.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import fxhybrid.codecs  # noqa: F401  (registers the compress and decompress operators)
from fxhybrid.capture.joint_graph import TAG, JointGraph, NodeTag, OutputKind, Phase
from fxhybrid.ir.schedule import Instruction, Kind, Schedule
from fxhybrid.passes.emitted_call import emitted_call
from fxhybrid.passes.graph_edit import PlainGraph, joint_module
from fxhybrid.passes.in_place import OVERWRITES
from fxhybrid.passes.storages import Layout, OpCall


def rewrite(joint: JointGraph, layout: Layout, schedule: Schedule) -> JointGraph:
    """Builds the joint graph that carries out ``schedule``; its roles are those of ``joint``."""
    return _Rewriter(joint, layout).run(schedule)


class _Rewriter:
    def __init__(self, joint: JointGraph, layout: Layout) -> None:
        self.joint = joint
        self.layout = layout
        self.graph = PlainGraph()
        self.phase = Phase.FORWARD
        self.returned = frozenset((*layout.outputs, *layout.mutations, *layout.gradients))
        self.resident: dict[fx.Node, fx.Node] = {}
        self.views: dict[tuple[fx.Node, tuple[int, ...], Phase], fx.Node] = {}
        self.whole: dict[int, fx.Node] = {}  # value -> new node that holds the whole storage
        self.encoded: dict[int, tuple[fx.Node, fx.Node]] = {}  # value -> its qdata and header
        self.at: dict[int, int] = {}  # storage -> value to read it from, here and now
        self.original: dict[int, int] = {}  # storage -> value that its own op made
        self.read_values: frozenset[int] = frozenset()
        self.counts = {"compress": 0, "decompress": 0, "recompute": 0}

    def run(self, schedule: Schedule) -> JointGraph:
        for node in self.joint.module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.resident[node] = self.graph.node_copy(node)
                self.resident[node].meta = {"val": node.meta["val"], TAG: node.meta[TAG]}
        self.read_values = frozenset(v for i in schedule.instructions for v in i.reads)
        overwrites = dict(schedule.overwrites)
        work = [(i, overwrites.get(position)) for position, i in enumerate(schedule.instructions)]
        for instruction, overwritten in work[: schedule.n_forward]:
            self._emit(instruction, overwritten)
        outputs = self._outputs(of_forward=True)
        self.phase = Phase.BACKWARD
        for instruction, overwritten in work[schedule.n_forward :]:
            self._emit(instruction, overwritten)
        outputs += self._outputs(of_forward=False)
        self._tag(self.graph.output(tuple(outputs)), None)
        return JointGraph(joint_module(self.joint.module, self.graph), self.joint.inputs, self.joint.outputs)

    def _emit(self, instruction: Instruction, overwritten: int | None) -> None:
        if instruction.kind is Kind.ENCODE:
            self._emit_encode(instruction)
        elif instruction.kind is Kind.DECODE:
            self._emit_decode(instruction)
        else:
            self._emit_op(instruction, overwritten)

    def _emit_op(self, instruction: Instruction, overwritten: int | None) -> None:
        call = emitted_call(self.layout, instruction, self.phase is Phase.FORWARD)
        if call is None:  # the optimizer's step
            return
        self.at = dict(zip(call.inputs, instruction.reads, strict=True))
        new = self.graph.create_node(
            "call_function",
            call.target,
            fx.node.map_arg(call.args, self._resolve),
            fx.node.map_arg(call.kwargs, self._resolve),
            self._name("recompute") if instruction.kind is Kind.RERUN else call.op.node.name,
        )
        self._tag(new, call.op.node.meta.get("val"))
        if overwritten is not None:
            new.meta[OVERWRITES] = overwritten
        self._take_outputs(call.op, new, instruction)

    def _take_outputs(self, op: OpCall, new: fx.Node, instruction: Instruction) -> None:
        for storage, value in zip(op.outputs, instruction.writes, strict=True):
            base = self.layout.storages[storage].base
            wanted = value in self.read_values
            if instruction.kind is not Kind.RERUN:
                self.original[storage] = value
                wanted = wanted or storage in self.returned
            if base is op.node:
                self.whole[value] = new
            elif base is not None and wanted:
                part = self.graph.call_function(operator.getitem, (new, base.args[1]))
                self.whole[value] = self._tag(part, base.meta["val"])

    def _emit_encode(self, instruction: Instruction) -> None:
        source = self.whole[instruction.reads[0]]
        compress = torch.ops.fxhybrid.compress.default
        new = self.graph.create_node(
            "call_function", compress, (source, instruction.codec), name=self._name("compress")
        )
        made = _encoded(source.meta["val"], instruction.codec)
        self._tag(new, made)
        qdata, header = (self._tag(self.graph.call_function(operator.getitem, (new, i)), made[i]) for i in range(2))
        self.encoded[instruction.writes[0]] = (qdata, header)

    def _emit_decode(self, instruction: Instruction) -> None:
        base = self.layout.storages[instruction.op].base
        assert base is not None, "only tensors that are read can be decoded"
        value: torch.Tensor = base.meta["val"]
        shape = (list(value.shape), list(value.stride()), value.dtype)
        new = self.graph.create_node(
            "call_function",
            torch.ops.fxhybrid.decompress.default,
            (*self.encoded[instruction.reads[0]], instruction.codec, *shape),
            name=self._name("decompress"),
        )
        self.whole[instruction.writes[0]] = self._tag(new, value)

    def _resolve(self, node: fx.Node) -> fx.Node:
        """Returns the new node that replaces ``node`` in the instruction being written."""
        if node in self.resident:
            return self.resident[node]
        behind = self.layout.storages_of[node]
        is_output = node in self.layout.op_nodes or (
            node.target is operator.getitem and node.args[0] in self.layout.op_nodes
        )
        if is_output:
            return self.whole[self.at[behind[0]]]
        key = (node, tuple(self.at[s] for s in behind), self.phase)
        if key not in self.views:
            self.views[key] = self._tag(self.graph.node_copy(node, self._resolve), node.meta["val"])
        return self.views[key]

    def _outputs(self, of_forward: bool) -> list[fx.Node | None]:
        self.at = self.original
        return [
            None if node is None else self._resolve(node)
            for node, role in zip(self.joint.output_nodes, self.joint.outputs, strict=True)
            if (role.kind is not OutputKind.GRADIENT) is of_forward
        ]

    def _name(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"{kind}_{self.counts[kind] - 1}"

    def _tag(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta.clear()
        node.meta.update({"val": value, TAG: NodeTag(self.phase)})
        return node


def _encoded(value: torch.Tensor, codec: str) -> tuple[Any, Any]:
    """Returns the fake values that encoding makes; None where sizes are symbolic: codecs count with numbers."""
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        return None, None
    made: tuple[Any, Any] = torch.ops.fxhybrid.compress.default(value, codec)
    return made
