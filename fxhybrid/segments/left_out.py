"""Leaves out of what a graph stores what an earlier graph of the step makes again when the backward half begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxhybrid.errors import BackwardError
from fxhybrid.segments.handed_storages import storage_identity, version_of
from fxhybrid.torch_internals import DisableAutocast

CHANGED = (
    "an argument, parameter or buffer was changed in place between forward and backward pass, and the plan recomputes "
    "a graph of the step from it. Change it after the backward pass, or raise the budget"
)


@dataclass(frozen=True, eq=False)
class Remaking:
    """Says what a part takes and does not keep, and what makes it again.

    Attributes:
        source: position of the earlier part that ran it first.
        run: the earlier part's forward half alone, called boxed.
        results: by the position of an input of the later part, that of a result of the earlier one.
    """

    source: int
    run: Callable[[list[Any]], Sequence[Any]]
    results: Mapping[int, int]


class KeptInputs:
    """Holds the inputs of a part that may run again; they are alive anyway, since its own backward half needs them."""

    def __init__(self, values: Sequence[Any]) -> None:
        """Takes the inputs, cut off from what computed them."""
        self.values = [value.detach() if isinstance(value, Tensor) else value for value in values]
        self._versions = self._count()

    def get(self) -> list[Any]:
        """Returns the inputs.

        Raises:
            BackwardError: one was changed since.
        """
        if self._count() != self._versions:
            raise BackwardError(CHANGED)
        return list(self.values)

    def _count(self) -> list[int]:
        return [version_of(value) for value in self.values if isinstance(value, Tensor)]


@dataclass(frozen=True, eq=False)
class _Slot:
    """Describes a saved value that is left out: where among them, which result it looks at, and how."""

    position: int
    result: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    storage_bytes: int

    def look_at(self, result: Tensor) -> Tensor:
        assert result.untyped_storage().nbytes() == self.storage_bytes, "a graph makes what it made before"
        empty = torch.empty(0, dtype=self.dtype, device=result.device)
        return empty.set_(result.untyped_storage(), self.offset, self.shape, self.strides)


@dataclass(frozen=True, eq=False)
class LeftOutValues:
    """Holds what makes the values again that a part did not keep.

    Attributes:
        again: for each source, what runs it, its inputs, and the saved values that look at its results.
    """

    again: tuple[tuple[Remaking, KeptInputs, tuple[_Slot, ...]], ...]

    def restore(self, saved: list[Tensor | None]) -> None:
        """Makes the values again.

        Raises:
            BackwardError: what they are made from was changed since.
        """
        for remaking, inputs, slots in self.again:
            with DisableAutocast(), torch.no_grad():
                results = remaking.run(inputs.get())
                for slot in slots:
                    saved[slot.position] = slot.look_at(results[slot.result])
            del results


def leave_out(
    saved: list[Tensor], inputs: Sequence[Any], remakings: Iterable[Remaking], kept: Mapping[int, KeptInputs]
) -> LeftOutValues | None:
    """Puts empty tensors in place of saved values that earlier parts make again; None where there are none.

    Args:
        saved: values of a part's forward half, which change.
        inputs: of the part.
        remakings: what is to be left out.
        kept: inputs of the earlier parts, by position.
    """
    again = []
    for remaking in remakings:
        results = {storage_identity(inputs[i]): result for i, result in remaking.results.items()}
        slots = []
        for position, value in enumerate(saved):
            result = results.get(storage_identity(value))
            if result is not None:
                offset, n_bytes = int(value.storage_offset()), value.untyped_storage().nbytes()
                slots.append(_Slot(position, result, value.dtype, value.shape, value.stride(), offset, n_bytes))
                saved[position] = value.new_empty(0)
        again.append((remaking, kept[remaking.source], tuple(slots)))
    return LeftOutValues(tuple(again)) if again else None
