"""Which outputs of the joint graph have gradients, and where they are in what the module returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxhybrid.capture.capture import Capture
from fxhybrid.capture.joint_graph import OutputKind
from fxhybrid.capture.python_state import unchanged_python_state
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.torch_internals import OutputType, TensorAlias, make_output_handler

_DIFFERENTIABLE = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)
_OF_A_BASE = (OutputType.alias_of_intermediate, OutputType.alias_of_intermediate_save_as_output)
_OF_AN_OUTPUT = OutputType.alias_of_intermediate_base_is_user_output


def tangent_outputs(metadata: Any) -> tuple[int, ...]:
    """Returns for each tangent the position of the graph's output whose gradient it is; bases follow the outputs.

    Args:
        metadata: AOTAutograd's, of the capture.
    """
    infos = metadata.output_info
    own = [i for i, info in enumerate(infos) if info.output_type in _DIFFERENTIABLE and _needs_gradient(info)]
    return (*own, *range(len(infos), len(infos) + metadata.num_intermediate_bases))


def tangents_of_outputs(metadata: Any) -> Mapping[int, int]:
    """Returns for each output with a gradient, bases and views of them included, the position of its tangent."""
    infos = metadata.output_info
    tangents = {output: k for k, output in enumerate(tangent_outputs(metadata))}
    for i, info in enumerate(infos):
        if info.output_type in (*_OF_A_BASE, _OF_AN_OUTPUT):
            base = info.base_idx + (0 if info.output_type is _OF_AN_OUTPUT else len(infos))
            if base in tangents:
                tangents[i] = tangents[base]
    return tangents


def output_handlers(metadata: Any) -> list[Callable[[Sequence[Any], Sequence[Any], Any], Any]]:
    """Returns for each output what makes it: takes the step's inputs, the graph's outputs, and its own among those."""
    return [_output_handler(info, metadata) for info in metadata.output_info]


def _output_handler(info: Any, metadata: Any) -> Callable[[Sequence[Any], Sequence[Any], Any], Any]:
    if info.output_type is not _OF_AN_OUTPUT or info.requires_grad:
        handler: Callable[[Sequence[Any], Sequence[Any], Any], Any] = make_output_handler(info, metadata, True)
        return handler
    # What is detached from an output in the same layout. AOTAutograd's handler would apply the views that lead to that
    # output once more, to the output itself: a transposed one would come back transposed twice.
    return _detached(info.base_idx)


def _detached(output: int) -> Callable[[Sequence[Any], Sequence[Any], Any], Any]:
    def handle(_: Sequence[Any], results: Sequence[Any], __: Any) -> Tensor:
        base = results[output]
        return (base.alias if isinstance(base, TensorAlias) else base).detach()

    return handle


def _needs_gradient(info: Any) -> bool:
    return issubclass(info.raw_type, Tensor) and bool(info.requires_grad_for_backward)


@dataclass(frozen=True)
class OutputStructure:
    """Says where the graph's outputs are in what the module returns.

    Attributes:
        leaves: for each tensor that the module returns, in order, its position among the graph's outputs; None for one
            that the graph does not return, such as an input.
        loss: the same of the loss; None if nothing says which one that is.
        kept: positions of the outputs that the model itself holds on to, in attributes or containers.
    """

    leaves: tuple[int | None, ...]
    loss: int | None
    kept: frozenset[int]


def output_structure(captured: Capture, step: Step, call: StepCall) -> OutputStructure:
    """Calls the captured step with stand-ins, without data, for what its graph computes; Python state stays as it was.

    Args:
        captured: of the step.
        step: model and loss.
        call: the arguments.
    """
    values = [
        node.meta["val"] if node is not None else None
        for node, role in zip(captured.joint.output_nodes, captured.joint.outputs, strict=True)
        if role.kind is OutputKind.USER_OUTPUT
    ]
    stand_ins = [_stand_in(value) for value in values[: len(captured.metadata.output_info)]]
    with unchanged_python_state(step.model):
        result = captured.bind(lambda *_: list(stand_ins))(step, *call)
    positions = {id(stand_in): i for i, stand_in in enumerate(stand_ins)}
    leaves = tuple(positions.get(id(leaf)) for leaf in output_tensors(result))
    kept = _kept(captured.metadata, leaves)
    if step.loss_fn is not None:
        return OutputStructure(leaves, leaves[0], kept)
    return OutputStructure(leaves, _loss_position(captured, result, positions), kept)


def _kept(metadata: Any, leaves: tuple[int | None, ...]) -> frozenset[int]:
    """Returns what the graph gives back only because the call leaves it in the model, with the bases of views."""
    infos = metadata.output_info
    kept = frozenset(range(len(infos))).difference(leaves)
    bases = (infos[i].base_idx + len(infos) for i in kept if infos[i].output_type in _OF_A_BASE)
    outputs = (infos[i].base_idx for i in kept if infos[i].output_type is _OF_AN_OUTPUT)
    return kept.union(bases, outputs)


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _loss_position(captured: Capture, result: Any, positions: Mapping[int, int]) -> int | None:
    """Finds the output called ``loss``.

    A number among other outputs is not taken for one: an energy has forces beside it that are trained, too.
    """
    named = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(named, Tensor) or named.numel() != 1:
        return None
    position = positions.get(id(named))
    return position if position in tangent_outputs(captured.metadata) else None


def output_tensors(output: Any, _within: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Yields the tensors of a model's output in order: containers, dataclasses and plain objects are looked into."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in _within:
            yield from output_tensors(list(vars(leaf).values()), (*_within, id(leaf)))
