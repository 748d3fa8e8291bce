"""Follows the storages that graphs of a step hand to each other and to its caller, and for how long they live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.ir.sequence import Shared


class HandedStorages:
    """Follows the storages that are made within a step.

    Attributes:
        existing: identities of storages that exist through the whole step.
        references: to those that are made, in order.
        shared: what is known of them so far, likewise.
        keys: their positions, by identity.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        """Begins with the tensors that exist through the whole step."""
        self.existing = {storage_identity(t) for t in existing}
        self.references: list[StorageWeakRef] = []
        self.shared: list[Shared] = []
        self.keys: dict[int, int] = {}
        self._versions: list[int] = []  # how often they had been changed in place when they were made

    def key(self, tensor: Tensor, maker: int) -> int | None:
        """Returns the storage of a tensor; None for one that exists through the whole step."""
        identity = storage_identity(tensor)
        if identity in self.existing:
            return None
        if identity not in self.keys:
            storage = tensor.untyped_storage()
            self.keys[identity] = len(self.shared)
            self.references.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]  # keeps the identity
            self.shared.append(Shared(storage.nbytes(), maker, maker))
            self._versions.append(version_of(tensor))
        key = self.keys[identity]
        if self._versions[key] != version_of(tensor):
            self.shared[key] = replace(self.shared[key], changed=True)
        return key

    def knows(self, tensor: Tensor) -> bool:
        """Says whether a tensor's storage exists through the whole step, or is handed from graph to graph."""
        return storage_identity(tensor) in self.existing or storage_identity(tensor) in self.keys

    def look(self, now: int) -> None:
        """Notes what is alive when a call begins."""
        for key, reference in enumerate(self.references):
            if not reference.expired():  # type: ignore[no-untyped-call]
                self.shared[key] = replace(self.shared[key], last=max(self.shared[key].last, now))

    def look_at_end(self, n_calls: int) -> None:
        """Notes what the caller holds after the forward pass."""
        for key, reference in enumerate(self.references):
            if not reference.expired():  # type: ignore[no-untyped-call]
                self.shared[key] = replace(self.shared[key], last=n_calls, held=True)

    def left(self) -> set[int]:
        """Returns what is alive now."""
        return {key for key, reference in enumerate(self.references) if not reference.expired()}  # type: ignore[no-untyped-call]


def version_of(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place; those of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 (has no public name)


def storage_identity(tensor: Tensor) -> int:
    """Returns what is the same for all tensors of one storage while something refers to it."""
    return int(tensor.untyped_storage()._cdata)
