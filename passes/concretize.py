"""Concretizes: a joint graph with symbolic sizes becomes the one of given sizes, without tracing anything again.

Sizes are arithmetic over a few symbols. All of it is compiled into one Python function, so that a graph of other sizes
costs a copy of the nodes and one fake tensor each. Nodes that compute sizes disappear: what they give is written into
their readers, as in a graph that was traced with these sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxhybrid.capture.joint_graph import JointGraph, storages
from fxhybrid.passes.graph_edit import PlainGraph, joint_module
from fxhybrid.passes.size_program import SYMBOLIC, SizeProgram, Sizes, Values
from fxhybrid.torch_internals import FakeTensor, FakeTensorMode

# Where sizes are known, a trace has no slice of all of its input, or an alias in its place.
_SLICES = (torch.ops.aten.slice.Tensor, torch.ops.aten.slice_backward.default, torch.ops.aten.alias.default)
_NUMBERS = (*SYMBOLIC, int, float)


def concretize(joint: JointGraph, sizes: Sizes) -> JointGraph:
    """Builds the joint graph that ``joint`` is at these sizes, without calls that give their input; ``joint`` stays.

    Raises:
        KeyError: a symbol of the graph has no size.
    """
    return SymbolicGraph(joint).at(sizes)


class SymbolicGraph:
    """Prepares a joint graph with symbolic sizes for being made concrete many times.

    Attributes:
        joint: the graph.
    """

    def __init__(self, joint: JointGraph) -> None:
        """Collects all sizes of ``joint``, which must stay as it is from now on."""
        self.joint = joint
        program = SizeProgram()
        nodes = joint.module.graph.nodes
        self._values = {node: value_recipe(node.meta.get("val"), program) for node in nodes}
        self._literals: dict[int, int] = {}
        self._layouts: dict[fx.Node, Layout] = {}
        for node in nodes:
            if node.target in _SLICES:
                self._layouts |= {n: _layout(n.meta["val"], program) for n in (node, node.args[0])}
            fx.node.map_aggregate((node.args, node.kwargs), lambda value: self._enter(value, program))
        self._numbers: Values = program.numbers
        self._evaluate = program.compiled()

    def _enter(self, value: Any, program: SizeProgram) -> Any:
        """Notes a symbolic number that stands in a call's arguments."""
        if isinstance(value, SYMBOLIC):
            self._literals[id(value)] = program.place(value)
        return value

    def at(self, sizes: Sizes) -> JointGraph:
        """Builds the joint graph of these sizes.

        Raises:
            KeyError: a symbol of the graph has no size.
        """
        values = self._evaluate(sizes)
        return self._built(values, values, ConcreteTensors())

    def symbolic_at(self, sizes: Sizes) -> JointGraph:
        """Builds the same graph with sizes that stay symbolic; it is the one of all sizes that leave out the same.

        Raises:
            KeyError: a symbol of the graph has no size.
        """
        return self._built(self._evaluate(sizes), self._numbers, _SymbolicTensors())

    def left_out(self, sizes: Sizes) -> tuple[bool, ...]:
        """Tells of each call that may give its input whether it does so at these sizes."""
        values = self._evaluate(sizes)
        return tuple(self._unchanged(node, values) is not None for node in self._layouts if node.target in _SLICES)

    def _built(self, values: Values, numbers: Values, fakes: _Fakes) -> JointGraph:
        """Builds the graph that has calls left out as the values say, and these numbers in it."""
        graph = PlainGraph()
        new: dict[fx.Node, Any] = {}

        def argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return new[value]
            return numbers[self._literals[id(value)]] if isinstance(value, SYMBOLIC) else value

        for node in self.joint.module.graph.nodes:
            source = self._unchanged(node, values)
            if source is not None:
                fakes.merge(node.meta["val"], source.meta["val"])
                new[node] = new[source]
                continue
            value = new[node] = self._values[node](numbers, fakes)
            is_number = isinstance(value, _NUMBERS)
            if is_number and node.op != "placeholder":
                continue
            args: Any = fx.node.map_aggregate(node.args, argument)
            if node.op == "output":
                args = (tuple(None if isinstance(n, _NUMBERS) else n for n in args[0]),)  # a size's gradient is itself
            kwargs: Any = fx.node.map_aggregate(node.kwargs, argument)
            twin = graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            twin.meta.update(node.meta, val=value)
            new[node] = value if is_number else twin
        return JointGraph(joint_module(self.joint.module, graph), self.joint.inputs, self.joint.outputs)

    def _unchanged(self, node: fx.Node, values: Values) -> fx.Node | None:
        """Returns the input of a node that gives nothing else."""
        if node.target not in _SLICES:
            return None
        source: Any = node.args[0]
        same = self._layouts[node](values) == self._layouts[source](values)
        return source if same else None


class _Fakes(Protocol):
    """Makes the values of a graph's nodes."""

    def merge(self, like: Tensor, source: Tensor) -> None:
        """Lets what was made of ``like`` be made of ``source``."""

    def tensor(self, like: Tensor, n_bytes: int, offset: int, size: Sequence[int], stride: Sequence[int], /) -> Tensor:
        """Makes a tensor of the type and device of ``like`` in the storage that stands for that of ``like``."""


class _SymbolicTensors:
    """Gives the symbolic tensors themselves, or views of what stands for them where calls are left out."""

    def __init__(self) -> None:
        self.sources: dict[int, Tensor] = {}

    def merge(self, like: Tensor, source: Tensor) -> None:
        (key,), (behind,) = storages(like), storages(source)
        if key != behind:
            self.sources[key] = self.sources.get(behind, source)

    def tensor(self, like: Tensor, _: int, offset: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
        source: Any = self.sources.get(storages(like)[0])
        if source is None:
            return like
        with source.fake_mode, torch.no_grad():
            view: Tensor = source.as_strided(size, stride, offset)
        return view


class ConcreteTensors:
    """Makes fake tensors of one mode, which share storages as those of the symbolic graph do."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.storages: dict[int, Any] = {}

    def merge(self, like: Tensor, source: Tensor) -> None:
        """Lets what was made of ``like`` be made of ``source``."""
        self.storages.setdefault(storages(like)[0], self.storages[storages(source)[0]])

    def tensor(self, like: Tensor, n_bytes: int, offset: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Makes a tensor of the type and device of ``like`` in the storage that stands for that of ``like``."""
        (key,) = storages(like)
        if key not in self.storages:
            self.storages[key] = torch.empty(n_bytes, dtype=torch.uint8, device="meta").untyped_storage()
        plain = torch.empty(0, dtype=like.dtype, device="meta").set_(self.storages[key], offset, size, stride)
        return FakeTensor(self.mode, plain, like.device)


Recipe = Callable[[Values, _Fakes], Any]
Layout = Callable[[Values], tuple[Any, ...]]


def value_recipe(value: Any, program: SizeProgram) -> Recipe:
    """Returns what makes the form of a node's value that numbers of the program give it."""
    if isinstance(value, Tensor):
        return _tensor_recipe(value, program)
    if isinstance(value, (list, tuple)):
        items, kind = [value_recipe(item, program) for item in value], type(value)
        return lambda values, fakes: kind(item(values, fakes) for item in items)
    if isinstance(value, _NUMBERS):
        place = program.place(value)
        return lambda values, _: values[place]
    return lambda _values, _: value


def _layout(value: Tensor, program: SizeProgram) -> Layout:
    """Returns what gives the bytes of a tensor's storage, its offset, sizes and strides."""
    numbers = (value.untyped_storage().nbytes(), value.storage_offset(), *value.shape, *value.stride())
    n_bytes, offset, *rest = (program.place(number) for number in numbers)
    size, stride = rest[: value.dim()], rest[value.dim() :]
    return lambda values: (values[n_bytes], values[offset], [values[i] for i in size], [values[i] for i in stride])


def _tensor_recipe(value: Tensor, program: SizeProgram) -> Recipe:
    layout = _layout(value, program)
    return lambda values, fakes: fakes.tensor(value, *layout(values))
