"""Trains with accelerate: mixed precision and accumulation over two micro-batches.

Needs ``pip install 'fxhybrid[hf]'``.
"""

from __future__ import annotations

import accelerate
import torch
from sklearn.datasets import load_digits
from torch import nn

import fxhybrid

data = load_digits()
pixels = torch.tensor(data.data, dtype=torch.float32)[:1792] / 8 - 1
labels = torch.tensor(data.target)[:1792]

accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
hidden = [layer for _ in range(6) for layer in (nn.GELU(), nn.Linear(128, 128))]
model = nn.Sequential(nn.Linear(64, 128), *hidden, nn.GELU(), nn.Linear(128, 10))
hybrid = fxhybrid.compile(model, budget="8MiB")
optimizer = torch.optim.Adam(hybrid.parameters(), lr=3e-3)
hybrid, optimizer = accelerator.prepare(hybrid, optimizer)
for epoch in range(3):
    for x, y in zip(pixels.split(448), labels.split(448), strict=True):
        with accelerator.accumulate(hybrid):
            loss = nn.functional.cross_entropy(hybrid(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
