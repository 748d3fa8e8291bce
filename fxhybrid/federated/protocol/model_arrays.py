"""A model's state as arrays that any transport can carry, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fxhybrid.federated.protocol.messages import Array, Arrays

WIDENED = (torch.bfloat16,)  # numpy has no such type; float32 holds every one of its values


def to_arrays(model: nn.Module) -> dict[str, Array]:
    """Copies all buffers and trained parameters that are part of the state; what is frozen everybody has already."""
    return {name: _array(tensor) for name, tensor in _shared(model).items()}


def _shared(model: nn.Module) -> dict[str, torch.Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _array(tensor: torch.Tensor) -> Array:
    plain = tensor.detach().cpu()
    return np.array((plain.float() if plain.dtype in WIDENED else plain).numpy(), copy=True)


def load_arrays(model: nn.Module, arrays: Arrays) -> None:
    """Writes arrays into the model in place; types are narrowed back to the model's own."""
    with torch.no_grad():
        for name, tensor in _shared(model).items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name], copy=True)))


def leading_slice(arrays: Arrays, like: Arrays) -> dict[str, Array]:
    """Takes the leading slice of each array, in the shapes of ``like``: a narrow model's part of a wide one."""
    return {name: arrays[name][tuple(slice(size) for size in part.shape)] for name, part in like.items()}
