"""Trains with Lightning; the callback plans at the first batch and keeps the plan in checkpoints.

Needs ``pip install 'fxhybrid[lightning]'``.
"""

from __future__ import annotations

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxhybrid.integrations.lightning_trainer import FxHybridCallback


class Classifier(lightning.LightningModule):
    """A net on digits, as anyone writes it."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(6) for layer in (nn.GELU(), nn.Linear(128, 128))]
        self.model = nn.Sequential(nn.Linear(64, 128), *hidden, nn.GELU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Computes the loss."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


data = load_digits()
pixels = torch.tensor(data.data, dtype=torch.float32) / 8 - 1
loader = DataLoader(TensorDataset(pixels, torch.tensor(data.target)), batch_size=599, shuffle=True)
callback = FxHybridCallback(budget="70%")
trainer = lightning.Trainer(
    max_epochs=3, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
)
trainer.fit(Classifier(), loader)
print({name: round(float(value), 3) for name, value in trainer.logged_metrics.items()})
