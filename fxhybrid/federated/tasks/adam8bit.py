"""Adam whose state takes two bytes a parameter, in place of eight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # numbers that share a scale, as in Dettmers et al., ICLR 2022


class Adam8bit(torch.optim.Optimizer):
    """Keeps Adam's moments in blocks of 8-bit numbers with one float32 scale each.

    The second moment is kept as its square root: linear steps of 1/255 of the block's largest are finer that way where
    numbers are small.

    Args:
        params: to train.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)
        return loss


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = 0
        blocks = -(-parameter.numel() // BLOCK)
        for name, dtype in (("mean", torch.int8), ("root", torch.uint8)):
            state[name] = torch.zeros(blocks, BLOCK, dtype=dtype, device=parameter.device)
            state[f"{name}_scale"] = torch.zeros(blocks, 1, device=parameter.device)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    gradient = torch.zeros(state["mean"].shape, device=parameter.device)
    gradient.view(-1)[: parameter.numel()] = parameter.grad.reshape(-1)  # type: ignore[union-attr]
    mean = (state["mean"] * state["mean_scale"]).lerp_(gradient, 1 - beta1)
    square = (state["root"] * state["root_scale"]).square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt_()
    step_size = group["lr"] / (1 - beta1 ** state["step"])
    denominator = root / (1 - beta2 ** state["step"]) ** 0.5 + group["eps"]
    change = (mean / denominator).view(-1)[: parameter.numel()].view(parameter.shape)
    parameter.add_(change, alpha=-step_size)
    _store(state, "mean", mean, 127)
    _store(state, "root", root, 255)


def _store(state: dict[str, Any], name: str, values: Tensor, largest: int) -> None:
    scale = values.abs().amax(1, keepdim=True) / largest
    state[name].copy_((values / scale.clamp_min(1e-30)).round_())
    state[f"{name}_scale"].copy_(scale)
