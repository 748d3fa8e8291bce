"""Images that go from graph to graph of a step: which may do so in channels_last, and what puts them back.

Where a graph computes in channels_last, what it hands on would be converted to the user's layout, and converted again
by the graph that takes it. Between them is Python, which sees the tensor: values are the same, strides are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from unittest.mock import patch
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx

from fxhybrid.capture.capture import Capture
from fxhybrid.capture.joint_graph import InputKind
from fxhybrid.torch_internals import GuardBuilder, OutputType

_OF_AN_INPUT = (OutputType.alias_of_input, OutputType.is_input)


def is_image(value: Any) -> bool:
    """Says whether a tensor is an image in the usual layout, computed earlier in the step."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.layout is not torch.strided:
        return False
    is_computed = value.requires_grad and not value.is_leaf and value.is_floating_point() and value.device.type == "cpu"
    if not is_computed or not all(type(n) is int for n in (*value.shape, *value.stride())):
        return False
    return value.is_contiguous() and not value.is_contiguous(memory_format=torch.channels_last)


def images_of(captured: Capture, example_inputs: Sequence[Any]) -> dict[int, tuple[int, ...]]:
    """Returns the strides of the inputs that a graph may take in another layout: it only reads them."""
    infos = captured.metadata.output_info
    seen = {info.base_idx for info in infos if info.output_type in _OF_AN_INPUT}
    roles = enumerate(zip(captured.joint.inputs, example_inputs, strict=False))
    read = (
        (i, value)
        for i, (role, value) in roles
        if role.kind is InputKind.USER_INPUT and not role.mutated and i not in seen
    )
    return {i: value.stride() for i, value in read if is_image(value)}


class StrideGuards:
    """Leaves out Dynamo's guards on the strides of images, but of those that a graph takes as they are."""

    def __init__(self) -> None:
        """Begins with a frame that has no graph yet."""
        self._as_they_are: frozenset[Any] = frozenset()

    def graph(self, graph: fx.GraphModule, images: Collection[int]) -> None:
        """Notes the graph of the frame that is converted, and the positions of images that it takes in any layout."""
        inputs = enumerate(node for node in graph.graph.nodes if node.op == "placeholder")
        self._as_they_are = frozenset(getattr(node, "_dynamo_source", None) for i, node in inputs if i not in images)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leaves them out while a frame is converted."""
        self._as_they_are = frozenset()
        torchs_own = GuardBuilder.TENSOR_MATCH

        def match(builder: Any, guard: Any, value: Any = None) -> None:
            source = guard.originating_source
            known = builder.check_fn_manager.output_graph.input_source_to_sizes_strides.get(source)
            if known is not None and source not in self._as_they_are and is_image(builder.get(guard)):
                known["stride"] = (None,) * len(known["stride"])
            torchs_own(builder, guard, value)

        with patch.object(GuardBuilder, "TENSOR_MATCH", match):
            yield


class HandedImages:
    """Follows the images that graphs of one call have handed on in channels_last.

    Attributes:
        were_restored: is called when some are put back.
    """

    def __init__(self, were_restored: Callable[[], None]) -> None:
        """Takes what is to be called."""
        self.were_restored = were_restored
        self._handed: list[ReferenceType[Tensor]] = []

    def add(self, images: Sequence[Tensor]) -> None:
        """Notes images that a graph has returned."""
        self._handed += map(ref, images)

    def n_bytes(self) -> int:
        """Counts what it takes to put them back."""
        return sum(image.nbytes for image in self._alive())

    def restore(self) -> None:
        """Puts the images into the usual layout that are still there: what comes now was not planned with them."""
        alive = self._alive()
        self._handed.clear()
        for image in alive:
            image.data = image.detach().contiguous()
        if alive:
            self.were_restored()

    def _alive(self) -> list[Tensor]:
        images = (reference() for reference in self._handed)
        return [image for image in images if image is not None]
