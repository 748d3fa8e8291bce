"""Tensors that the model computes and makes leaves of: they are to get a gradient, or one is taken at them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid import CaptureError
from tests.compare import twins
from tests.models import WIDTH, mlp

X = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))


class Adapted(nn.Module):
    """A frozen lower half whose output is made to need a gradient, as PEFT does for checkpoints."""

    def __init__(self, returned: str = "output") -> None:
        super().__init__()
        self.words, self.body, self.returned = nn.Embedding(50, WIDTH), mlp(), returned
        self.words.requires_grad_(False)
        self.body[0].requires_grad_(False)
        if returned == "output":
            self.words.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))

    def forward(self, words: Tensor) -> Any:
        if self.returned == "output":
            first, second = self.body(self.words(words)).chunk(2)  # an operator that gives several tensors
            return torch.cat((second, first))
        hidden = self.words(words)
        if self.returned == "assigned":
            hidden = hidden.detach()
            hidden.requires_grad = True  # as speech models do behind a frozen feature extractor
            return self.body(hidden)
        hidden.requires_grad_()
        return self.body(hidden), hidden.detach() if self.returned == "detached" else hidden


def test_intermediates_that_are_made_to_need_a_gradient() -> None:
    words = torch.randint(0, 50, (96,))
    for returned in ("output", "detached", "assigned"):
        pair = twins(Adapted(returned).train(), example_inputs=(words,))
        pair.same(lambda m: (out := m(words), (out if isinstance(out, Tensor) else out[0]).sum().backward())[0])
    with pytest.raises(CaptureError, match=r"requires_grad_\(\).*x\.detach\(\)"):
        fxhybrid.compile(
            Adapted("leaf").train(), example_inputs=(words,), budget=1.0, solver="mps", compression="lossless"
        )


def test_gradient_penalty_at_a_leaf_made_inside() -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            score = self.body(x).tanh().sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return score + (slope.norm(dim=1) - 1).square().mean()

    twins(Penalty().train(), example_inputs=(X,)).same(lambda m: (loss := m(X), loss.backward())[0])
