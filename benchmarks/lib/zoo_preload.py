"""Imports and sets up what every trial of the zoo needs: only the process that they are forked from imports this.

A trial then pays neither for imports nor for what the first capture in a process sets up.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings

import torch
from torch import nn
from torch.nn import functional as F

warnings.simplefilter("ignore")  # what libraries say about untrained models
for name in ("benchmarks.lib.torchvision_import", "timm"):  # in this order, and before transformers
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)

trial, batches = (importlib.import_module(f"benchmarks.lib.zoo_{name}") for name in ("trial", "batches"))
torch.set_num_threads(1)
stack = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(), nn.Linear(8, 8))
trial.lossless(stack, batches.Batch((torch.randn(2, 8),), loss_fn=F.cross_entropy, loss_args=(batches.classes(2),)))
torch.compiler.reset()
