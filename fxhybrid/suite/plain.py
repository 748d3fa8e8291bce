"""Networks that are little more than one kind of layer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from fxhybrid.suite.case import Size, SuiteCase, class_loss
from fxhybrid.suite.sample_data import labels


def gru(size: Size, data: Generator) -> SuiteCase:
    batch, length, n_features, hidden = (32, 128, 64, 256) if size == "full" else (16, 48, 32, 64)
    # Sums of small steps, as sensors give; brought to deviation 1.
    signals = torch.randn(batch, length, n_features, generator=data).cumsum(1) / length**0.5
    model = GRUClassifier(n_features, hidden)
    return SuiteCase("gru", model, (signals,), class_loss, (labels(batch, 10, data),))


def mlp(size: Size, data: Generator) -> SuiteCase:
    batch, n_features, width, depth = (2048, 784, 512, 6) if size == "full" else (2048, 64, 128, 4)
    widths = [n_features] + [width] * depth
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    features = torch.randn(batch, n_features, generator=data)
    return SuiteCase("mlp", model, (features,), class_loss, (labels(batch, 10, data),))


class GRUClassifier(nn.Module):
    """Runs two GRU layers over (batch, length, features) and classifies the last step's state."""

    def __init__(self, n_features: int, hidden: int, n_classes: int = 10) -> None:
        super().__init__()
        self.gru = nn.GRU(n_features, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.head(states[:, -1])  # type: ignore[no-any-return]
