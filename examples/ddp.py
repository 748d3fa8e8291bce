"""Trains on two processes: DistributedDataParallel goes around the compiled module, not the other way round."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxhybrid

WORLD_SIZE = 2


def train(rank: int, rendezvous: str) -> None:
    """Trains on one process's share of the digits."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32)[rank::WORLD_SIZE] / 8 - 1
    labels = torch.tensor(data.target)[rank::WORLD_SIZE]
    torch.manual_seed(0)
    hidden = [layer for _ in range(6) for layer in (nn.GELU(), nn.Linear(128, 128))]
    model = nn.Sequential(nn.Linear(64, 128), *hidden, nn.GELU(), nn.Linear(128, 10))
    hybrid = fxhybrid.compile(model, budget="70%", example_inputs=(pixels[:224],))
    # The buckets in which gradients are exchanged hold them too, so no second copy is needed.
    parallel = DistributedDataParallel(hybrid, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=3e-3)
    for epoch in range(3):
        for x, y in zip(pixels[:896].split(224), labels[:896].split(224), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(parallel(x), y)
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)
    right = (model(pixels).argmax(1) == labels).float().mean()
    if rank == 0:
        print(f"accuracy {right.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, args=(os.path.join(folder, "rendezvous"),), nprocs=WORLD_SIZE)
