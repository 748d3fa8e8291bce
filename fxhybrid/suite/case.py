"""One case of the model suite, and the losses that the cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

Size = Literal["full", "small"]


@dataclass(frozen=True)
class SuiteCase:
    """Holds a model with one batch and its loss.

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
        """Computes the loss of the case's batch, by its own model or by another form of it."""
        model = self.model if model is None else model
        return self.loss_fn(model(*self.inputs, **self.kwargs), *self.loss_args)

    @property
    def tensors(self) -> list[Tensor]:
        """Lists what the caller holds over a step in addition to the model: inputs and labels."""
        held = (*self.inputs, *self.kwargs.values(), *self.loss_args)
        return [value for value in held if isinstance(value, Tensor)]


def class_loss(output: Tensor, target: Tensor) -> Tensor:
    """Computes the cross entropy of class scores (batch, classes, ...) and class ids (batch, ...)."""
    return F.cross_entropy(output, target)


def logits_loss(output: Any, target: Tensor) -> Tensor:
    """Computes the cross entropy of a Hugging Face classifier's ``logits``."""
    return F.cross_entropy(output.logits, target)


def token_loss(output: Any, target: Tensor) -> Tensor:
    """Computes the cross entropy of each position's ``logits`` (batch, length, vocabulary) and its own token."""
    return F.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def next_token_loss(output: Any, target: Tensor) -> Tensor:
    """Computes the cross entropy of each position's ``logits`` and the token after it."""
    shifted = output.logits[:, :-1]
    return F.cross_entropy(shifted.flatten(0, 1), target[:, 1:].flatten())
