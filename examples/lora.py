"""Trains LoRA adapters on a frozen GPT-2: only what the adapters' gradients need is kept.

Needs ``pip install 'fxhybrid[hf]' peft``. The text is a module of Python's standard library, as bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fxhybrid

text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
windows = text[: 64 * 16 * 8].view(8, 16, 64)

torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256, n_positions=64))
adapters = peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
model = peft.get_peft_model(base, adapters).train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
hybrid = fxhybrid.compile(model, budget="60%", optimizer=optimizer)
for epoch in range(2):
    for words in windows:
        optimizer.zero_grad()
        loss = hybrid(input_ids=words, labels=words).loss
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
print(f"{sum(p.numel() for p in trained)} trained parameters, peak {hybrid.plan.peak_bytes / 2**20:.2f} MiB")
