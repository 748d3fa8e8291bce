"""Leaves out of what a graph stores what is recomputed by an earlier graph when the backward half begins."""

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
class Recomputation:
    """Says what a part takes and does not keep, and what recomputes it.

    Attributes:
        source: position of the earlier part that ran it first.
        run: the earlier part's forward half alone, called boxed.
        results: by the position of an input of the later part, that of a result of the earlier one.
    """

    source: int
    run: Callable[[list[Any]], Sequence[Any]]
    results: Mapping[int, int]


class KeptInputs:
    """Holds the inputs of a part that is recomputed; the plan counts them for as long (``Source.reads``)."""

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

    @classmethod
    def of(cls, value: Tensor, position: int, result: int) -> _Slot:
        form = value.dtype, value.shape, value.stride()
        return cls(position, result, *form, int(value.storage_offset()), value.untyped_storage().nbytes())

    def look_at(self, result: Tensor) -> Tensor:
        assert result.untyped_storage().nbytes() == self.storage_bytes, "a graph makes what it made before"
        empty = torch.empty(0, dtype=self.dtype, device=result.device)
        return empty.set_(result.untyped_storage(), self.offset, self.shape, self.strides)


@dataclass(frozen=True, eq=False)
class LeftOutValues:
    """Holds what recomputes the values that a part did not keep.

    Attributes:
        recomputations: for each source, what runs it, its inputs, and the saved values that look at its results.
    """

    recomputations: tuple[tuple[Recomputation, KeptInputs, tuple[_Slot, ...]], ...]

    def restore(self, saved: list[Tensor | None]) -> None:
        """Recomputes the values.

        Raises:
            BackwardError: what they are made from was changed since.
        """
        for recomputation, inputs, slots in self.recomputations:
            with DisableAutocast(), torch.no_grad():
                results = recomputation.run(inputs.get())
                for slot in slots:
                    saved[slot.position] = slot.look_at(results[slot.result])
            del results


class RecomputedParts:
    """Keeps, within one call, what the parts need that are recomputed in its backward pass."""

    def __init__(self, sources: Iterable[int]) -> None:
        """Takes the positions of these parts."""
        self._sources = frozenset(sources)
        self._inputs: dict[int, KeptInputs] = {}
        self._versions: dict[int, int] = {}  # of what they returned, by storage

    def note(self, position: int, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """Notes what a part took and returned."""
        if position in self._sources:
            self._inputs[position] = KeptInputs(inputs)
            self._versions |= {storage_identity(t): version_of(t) for t in outputs}

    def are_as_made(self, recomputations: Iterable[Recomputation], arguments: Sequence[Any]) -> bool:
        """Says whether what is to be recomputed is as its part returned it: Python may have changed it in place."""
        taken = (arguments[i] for recomputation in recomputations for i in recomputation.results)
        return all(self._versions.get(storage_identity(t)) == version_of(t) for t in taken)

    def leave_out(
        self, saved: list[Tensor], inputs: Sequence[Any], recomputations: Iterable[Recomputation]
    ) -> LeftOutValues | None:
        """Puts empty tensors in place of saved values; returns what recomputes these, None for nothing.

        Args:
            saved: values of a part's forward half.
            inputs: of the part.
            recomputations: what it does not keep.
        """
        found = []
        for recomputation in recomputations:
            results = {storage_identity(inputs[i]): result for i, result in recomputation.results.items()}
            slots = []
            for position, value in enumerate(saved):
                result = results.get(storage_identity(value))
                if result is not None:
                    slots.append(_Slot.of(value, position, result))
                    saved[position] = value.new_empty(0)
            found.append((recomputation, self._inputs[recomputation.source], tuple(slots)))
        return LeftOutValues(tuple(found)) if found else None
