"""Counts who holds a storage."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def storage_uses(reference: StorageWeakRef) -> int:
    """Counts who holds a storage: tensors, and its own Python object."""
    return int(torch._C._storage_Use_Count(reference.cdata))  # noqa: SLF001 (no public name)


def _python_uses() -> int:
    tensor = torch.empty(1)
    return storage_uses(StorageWeakRef(tensor.untyped_storage())) - 1  # type: ignore[no-untyped-call]


PYTHON_USES = _python_uses()  # what a storage's own Python object adds to its uses
