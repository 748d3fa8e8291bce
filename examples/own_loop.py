"""Trains a convolution net on scikit-learn's digits in 60 % of the memory of its unmodified step."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import fxhybrid

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(data.target)
train_images, train_labels = images[:1536].split(256), labels[:1536].split(256)


def block(n_in: int, n_out: int) -> list[nn.Module]:
    """Lists the layers of one block."""
    return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]


hidden = [layer for _ in range(5) for layer in block(32, 32)]
model = nn.Sequential(*block(1, 32), *hidden, nn.Flatten(), nn.Linear(32 * 8 * 8, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
hybrid = fxhybrid.compile(
    model,
    budget="60%",
    example_inputs=(train_images[0],),
    loss_fn=nn.functional.cross_entropy,
    loss_args=(train_labels[0],),
    optimizer=optimizer,  # its state and its step count, too
)
print(hybrid.report())
for epoch in range(3):
    for x, y in zip(train_images, train_labels, strict=True):
        optimizer.zero_grad()
        loss = hybrid(x, loss_args=(y,))
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
model.eval()
accuracy = (model(images[1536:]).argmax(1) == labels[1536:]).float().mean()
print(f"held-out accuracy {accuracy:.3f}")
