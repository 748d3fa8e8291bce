"""The bytes that a step cannot do without: parameters and gradients."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sums the bytes of the distinct storages behind ``tensors``."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def gradient_bytes(model: nn.Module) -> int:
    """Returns the bytes of one full set of parameter gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
