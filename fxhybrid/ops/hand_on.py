"""``fxhybrid::hand_on``: gives back the tensor that it takes, as a value of the graph that takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("fxhybrid", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("hand_on(Tensor x) -> Tensor")


def _hand_on(x: Tensor) -> Tensor:
    """Returns the tensor itself: no copy, and no autograd, since it runs within planned graphs only."""
    return x


def _fake_hand_on(x: Tensor) -> Tensor:
    """Stands for another storage: from here on the graph alone says how long it lives."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


_LIBRARY.impl("hand_on", _hand_on, "CompositeExplicitAutograd")
torch.library.register_fake("fxhybrid::hand_on", _fake_hand_on, lib=_LIBRARY)
HAND_ON = torch.ops.fxhybrid.hand_on.default
