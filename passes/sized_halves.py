"""Halves of a step for many sizes: one pair of graphs, to which the numbers that depend on sizes are arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import fx

from fxhybrid.capture.joint_graph import TAG, InputKind, InputRole, JointGraph, NodeTag, Phase
from fxhybrid.ir.schedule import Schedule
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.size_program import SYMBOLIC, SizeProgram, Sizes, Values
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.passes.storages import Layout


class SizedHalves:
    """Holds both halves with numbers as arguments: behind all others, but for the tangents."""

    def __init__(self, joint: JointGraph, layout: Layout, schedule: Schedule) -> None:
        """Rewrites and splits a joint graph with symbolic sizes."""
        program = SizeProgram()
        rewritten = rewrite(joint, layout, schedule)
        n_inputs = sum(role.kind is not InputKind.TANGENT for role in joint.inputs)
        places = _take_numbers(rewritten, program)
        roles = [InputRole(InputKind.SIZE, str(place)) for place in places]
        inputs = (*joint.inputs[:n_inputs], *roles, *joint.inputs[n_inputs:])
        self.graphs = split(JointGraph(rewritten.module, inputs, rewritten.outputs))
        self._evaluate, self._places = program.compiled(), places
        read = self.graphs.resident_inputs
        self.resident_inputs = tuple(i for i in read if i < n_inputs)
        self._backward_places = [places[i - n_inputs] for i in read if i >= n_inputs]

    def numbers(self, sizes: Sizes) -> tuple[Values, Values]:
        """Computes what the halves take at some sizes."""
        values = self._evaluate(sizes)
        return [values[place] for place in self._places], [values[place] for place in self._backward_places]


def _take_numbers(joint: JointGraph, program: SizeProgram) -> list[int]:
    """Lets nodes read symbolic numbers from new inputs; returns the place of each."""
    graph = joint.module.graph
    inputs: dict[int, fx.Node] = {}
    last = [node for node, role in zip(joint.placeholders, joint.inputs, strict=True) if _is_primal(role)][-1]

    def taken(value: Any) -> Any:
        if not isinstance(value, SYMBOLIC):
            return value
        place = program.place(value)
        if place not in inputs:
            with graph.inserting_after(list(inputs.values())[-1] if inputs else last):
                inputs[place] = graph.placeholder(f"size_{place}")
            inputs[place].meta = {"val": value, TAG: NodeTag(Phase.FORWARD)}
        return inputs[place]

    for node in list(graph.nodes):
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, taken)
            node.kwargs = fx.node.map_aggregate(node.kwargs, taken)
    return list(inputs)


def _is_primal(role: InputRole) -> bool:
    return role.kind is not InputKind.TANGENT


class SharedGraphs(SplitGraphs):
    """Runs halves for many sizes at some of them; those of these sizes alone are built when somebody reads them."""

    def __init__(self, halves: SizedHalves, sizes: Sizes, build: Callable[[], SplitGraphs]) -> None:
        """Prepares halves for some sizes.

        Args:
            halves: for many sizes.
            sizes: by the symbol's name.
            build: makes the halves for these sizes alone.
        """
        graphs = halves.graphs
        self.__dict__.update(  # a frozen dataclass
            n_forward_outputs=graphs.n_forward_outputs,
            n_saved=graphs.n_saved,
            resident_inputs=halves.resident_inputs,
            halves=graphs,
            numbers=halves.numbers(sizes),
            build=build,
        )

    @cached_property
    def alone(self) -> SplitGraphs:
        """The halves for these sizes alone."""
        built: SplitGraphs = self.__dict__["build"]()
        return built

    @property
    def forward(self) -> fx.GraphModule:
        """The forward half for these sizes alone."""
        return self.alone.forward

    @property
    def backward(self) -> fx.GraphModule:
        """The backward half for these sizes alone."""
        return self.alone.backward

    @property
    def joint(self) -> JointGraph:
        """What was split, for these sizes alone."""
        return self.alone.joint

    @property
    def hands_gradients_over(self) -> bool:
        """Whether the backward half lets gradients be taken as soon as they are made."""
        found: bool = self.__dict__["halves"].hands_gradients_over
        return found

    def run_forward(self, arguments: list[Any]) -> Sequence[Any]:
        """Runs the forward half; takes the arguments out of their list."""
        arguments += self.__dict__["numbers"][0]
        results: Sequence[Any] = self.__dict__["halves"].run_forward(arguments)
        return results

    def run_backward(self, arguments: list[Any]) -> Sequence[Any]:
        """Runs the backward half; takes the arguments out of their list."""
        first = self.n_saved + len(self.resident_inputs)
        arguments[first:first] = self.__dict__["numbers"][1]
        results: Sequence[Any] = self.__dict__["halves"].run_backward(arguments)
        return results
