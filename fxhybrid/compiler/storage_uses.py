"""Counts who holds a storage."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.torch_internals import storage_use_count


def storage_uses(reference: StorageWeakRef) -> int:
    """Counts who holds a storage: tensors, and its own Python object."""
    return int(storage_use_count(reference.cdata))


def _python_uses() -> int:
    tensor = torch.empty(1)
    return storage_uses(StorageWeakRef(tensor.untyped_storage())) - 1  # type: ignore[no-untyped-call]


PYTHON_USES = _python_uses()  # what a storage's own Python object adds to its uses
