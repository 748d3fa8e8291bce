"""The LoRA task: a small causal language model with a frozen base and trained adapters, as phones fine-tune."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.tasks.data import ArrayData
from fxhybrid.federated.tasks.tasks import PACKAGE_BYTES, Task, held_out_windows
from fxhybrid.suite.sample_data import consecutive_windows, library_packages
from fxhybrid.suite.small_models import ByteTransformer, next_byte_loss, seeded

LENGTH, BATCH, N_LAYERS = 64, 8, 4
RANK, ALPHA = 8, 16.0
BASE_PACKAGES, BASE_STEPS = 6, 120


class LoraLinear(nn.Module):
    """Adds a trained product of two thin matrices to a frozen linear layer (Hu et al., ICLR 2022)."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Applies layer and adapter to (..., in_features)."""
        return self.base(x) + (x @ self.down.T) @ self.up.T * (ALPHA / RANK)  # type: ignore[no-any-return]


def with_adapters(model: nn.Module) -> nn.Module:
    """Freezes a model and puts adapters on all of its linear layers."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LoraLinear):
                setattr(module, name, LoraLinear(child))
    return model


@functools.lru_cache(maxsize=4)
def _base(seed: int) -> dict[str, Tensor]:
    """Trains the base on packages that no client holds; the same for everybody."""
    model = seeded(_language_model, seed)
    packages = sorted(library_packages(BASE_PACKAGES, 2 * PACKAGE_BYTES).values())
    data = ArrayData(*consecutive_windows(b"".join(packages), LENGTH))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = data.batches(2 * BATCH, (seed, 7))
    for _ in range(BASE_STEPS):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        next_byte_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


def _language_model() -> ByteTransformer:
    return ByteTransformer(width=64, n_heads=4, n_layers=N_LAYERS, length=LENGTH)


def lora_task(n_clients: int, *, seed: int = 0) -> Task:
    """Makes the task: one package of the standard library per client, a base trained on others, 8-bit Adam.

    Only adapters are trained, sent and averaged. Small beside the 0.5 to 4 billion parameters that phones fine-tune, so
    that two cores can train it; what is held by a step is made up alike: a frozen base, activations for adapters only,
    two bytes of state for each trained number.
    """

    def make_model(width: float) -> nn.Module:
        if width != 1.0:
            raise InvalidArgument(f"adapters fit one base; width is {width}, it must be 1")
        model = _language_model()
        model.load_state_dict(_base(seed))
        return seeded(lambda: with_adapters(model), seed)

    packages = library_packages(n_clients + BASE_PACKAGES, PACKAGE_BYTES)
    largest = set(library_packages(BASE_PACKAGES, PACKAGE_BYTES))
    own = {name: text for name, text in packages.items() if name not in largest}
    clients, held_out = held_out_windows(own, LENGTH)
    return Task("lora", make_model, next_byte_loss, BATCH, 3e-3, "adam8bit", clients, held_out)
