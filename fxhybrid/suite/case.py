"""One case of the model suite, and the random data and losses that the cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Size = Literal["full", "small"]


@dataclass(frozen=True)
class SuiteCase:
    """A model with one batch and its loss.

    Attributes:
        name: the suite's name for it.
        model: in training mode, random weights.
        inputs: positional arguments of the model.
        loss_fn: ``loss_fn(output, *loss_args)`` is the scalar loss.
        loss_args: the loss's own tensors (labels).
        kwargs: keyword arguments of the model.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss_fn: Callable[..., Tensor]
    loss_args: tuple[Tensor, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """The loss of the case's batch, by its own model or by another that stands for it."""
        model = self.model if model is None else model
        return self.loss_fn(model(*self.inputs, **self.kwargs), *self.loss_args)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that the caller holds over a step besides the model: inputs and labels."""
        held = (*self.inputs, *self.kwargs.values(), *self.loss_args)
        return [value for value in held if isinstance(value, Tensor)]


def smooth_images(batch: int, pixels: int, data: Generator, channels: int = 3) -> Tensor:
    """Images whose neighbouring pixels are alike, as in photographs; mean 0 and deviation 1 per channel."""
    coarse = torch.randn(batch, channels, max(2, pixels // 8), max(2, pixels // 8), generator=data)
    images = F.interpolate(coarse, size=(pixels, pixels), mode="bilinear")
    images += 0.2 * torch.randn(images.shape, generator=data)
    deviation, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
    return (images - mean) / deviation


def word_ids(batch: int, length: int, vocabulary: int, data: Generator) -> Tensor:
    """Token ids that follow Zipf's law, as words do; ids 0 to 9 are left to special tokens."""
    share = 1 / torch.arange(3, vocabulary - 10 + 3, dtype=torch.float64)
    ids = torch.multinomial(share, batch * length, replacement=True, generator=data)
    return ids.view(batch, length) + 10


def labels(batch: int, n_classes: int, data: Generator) -> Tensor:
    return torch.randint(n_classes, (batch,), generator=data)


def class_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of class scores (batch, classes, ...) and class ids (batch, ...)."""
    return F.cross_entropy(output, target)


def logits_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy of a Hugging Face classifier's ``logits``."""
    return F.cross_entropy(output.logits, target)


def token_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy of each position's ``logits`` (batch, length, vocabulary) and its own token."""
    return F.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def next_token_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy of each position's ``logits`` and the token after it."""
    shifted = output.logits[:, :-1]
    return F.cross_entropy(shifted.flatten(0, 1), target[:, 1:].flatten())
