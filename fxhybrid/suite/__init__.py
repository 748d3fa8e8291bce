"""The built-in model suite: what the CLI, the tests and the benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator

from fxhybrid.errors import InvalidArgument
from fxhybrid.suite import convnets, huggingface, plain
from fxhybrid.suite.case import Size, SuiteCase

__all__ = ["Size", "SuiteCase", "load", "names"]

_BUILDERS: dict[str, Callable[[Size, Generator], SuiteCase]] = {
    "resnet50": convnets.resnet50,
    "mobilenetv2": convnets.mobilenetv2,
    "bert": huggingface.bert,
    "gpt2": huggingface.gpt2,
    "vit": huggingface.vit,
    "t5": huggingface.t5,
    "unet": convnets.unet,
    "gru": plain.gru,
    "mlp": plain.mlp,
}


def names() -> list[str]:
    """Lists the names that :func:`load` knows, in the suite's order."""
    return list(_BUILDERS)


def load(name: str, size: Size = "full", *, seed: int = 0) -> SuiteCase:
    """Builds one case on the CPU; the same arguments give the same weights and data.

    Args:
        name: one of :func:`names`.
        size: ``"full"``, or ``"small"`` for the same structure in some milliseconds a step.
        seed: of weights and data; the global random state is left as it is.
    """
    if name not in _BUILDERS:
        raise InvalidArgument(f"no suite model {name!r}; there are {', '.join(_BUILDERS)}")
    if size not in ("full", "small"):
        raise InvalidArgument(f'size must be "full" or "small", got {size!r}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = _BUILDERS[name](size, Generator().manual_seed(seed))
    case.model.train()
    return case
