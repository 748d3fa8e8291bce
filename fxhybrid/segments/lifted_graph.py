"""Makes a module of one of Dynamo's graphs, which owns the parameters and buffers that it takes as arguments."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

ALONE = 2  # references to a tensor that one dictionary holds, while they are counted


class LiftedGraph(nn.Module):
    """Wraps a Dynamo graph so that its parameter and buffer arguments are the module's own again."""

    def __init__(self, graph: fx.GraphModule, arguments: Sequence[Any], own: Collection[int] | None = None) -> None:
        """Takes the graph, its first arguments, and the identities of the model's tensors, if others may occur.

        Modules that the model makes within its forward pass have buffers of their own, which are new in each call.
        """
        super().__init__()
        self.graph = fx.GraphModule(graph, graph.graph)  # Dynamo's own kind compiles itself lazily: not traceable
        self.owned: dict[int, str] = {}
        for position, (node, value) in enumerate(zip(_placeholders(graph), arguments, strict=True)):
            is_new = own is not None and id(value) not in own
            if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and _is_static(node) and not is_new):
                self.owned[position] = f"owned_{position}"
        self.take(arguments)
        self.n_arguments = len(arguments)

    def take(self, arguments: Sequence[Any]) -> None:
        """Makes the parameters and buffers among ``arguments`` its own."""
        for position, name in self.owned.items():
            value = arguments[position]
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def twin(self, arguments: Sequence[Any]) -> LiftedGraph:
        """Returns the same graph with the parameters and buffers of other arguments: those of another layer."""
        twin = LiftedGraph.__new__(LiftedGraph)
        nn.Module.__init__(twin)
        twin.graph, twin.owned, twin.n_arguments = self.graph, self.owned, self.n_arguments
        twin.take(arguments)
        return twin

    @property
    def is_shared(self) -> bool:
        """Whether anybody else holds its parameters and buffers, too."""
        held: Sequence[Mapping[str, Tensor | None]] = (self._parameters, self._buffers)
        return all(sys.getrefcount(own[name]) > ALONE for own in held for name in own)

    def forward(self, *free: Any) -> Any:
        """Runs the graph on its own tensors and those that are given."""
        return self.graph(*self.full(free))

    def full(self, free: Sequence[Any]) -> list[Any]:
        """Returns the graph's arguments: its own tensors and those that are given."""
        own, rest = self._own(), iter(free)
        return [own[i] if i in own else next(rest) for i in range(self.n_arguments)]

    def free_of(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the arguments that are not the module's own."""
        return tuple(value for i, value in enumerate(arguments) if i not in self.owned)

    def owns(self, arguments: Sequence[Any]) -> bool:
        """Says whether parameters and buffers among ``arguments`` are still the module's own."""
        return all(arguments[i] is value for i, value in self._own().items())

    def _own(self) -> dict[int, Tensor | None]:
        """Returns its own tensors by position, in a fraction of the time that their names as attributes take."""
        parameters, buffers = self._parameters, self._buffers
        return {i: parameters[name] if name in parameters else buffers[name] for i, name in self.owned.items()}


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _is_static(node: fx.Node) -> bool:
    """Says whether Dynamo declares that the argument is a parameter or buffer of the user's module."""
    tensor_dict = node.meta.get("tensor_dict") or {}
    return "_dynamo_static_input_type" in tensor_dict
