"""Trains under bfloat16 autocast: the plan sees the types that the operators run in."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import fxhybrid

data = load_digits()
pixels = torch.tensor(data.data, dtype=torch.float32) / 8 - 1
labels = torch.tensor(data.target)

hidden = [layer for _ in range(6) for layer in (nn.GELU(), nn.Linear(128, 128))]
model = nn.Sequential(nn.Linear(64, 128), *hidden, nn.GELU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
hybrid = fxhybrid.compile(model, budget="80%", loss_fn=nn.functional.cross_entropy, optimizer=optimizer)
for epoch in range(3):
    for x, y in zip(pixels.split(599), labels.split(599), strict=True):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = hybrid(x, loss_args=(y,))  # planned here, at the first call
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
print(f"peak {hybrid.plan.peak_bytes / 2**20:.2f} MiB of {hybrid.plan.budget_bytes / 2**20:.2f} MiB")
