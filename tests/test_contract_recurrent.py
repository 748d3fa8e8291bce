"""Recurrent layers: one operator a layer, bit-equal to eager, within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fxhybrid
from fxhybrid import CaptureError, measure_step, suite
from tests.compare import assert_same, state_of, tighten, total, twins

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: nn.GRU(12, 16, num_layers=2, batch_first=True),
    "gru_dropout": lambda: nn.GRU(12, 16, num_layers=3, batch_first=True, dropout=0.4),
    "gru_two_ways": lambda: nn.GRU(12, 16, num_layers=2, bidirectional=True, dropout=0.2),
    "lstm": lambda: nn.LSTM(12, 16, num_layers=2),
    "lstm_dropout": lambda: nn.LSTM(12, 16, num_layers=2, batch_first=True, dropout=0.4, bias=False),
    "lstm_two_ways": lambda: nn.LSTM(12, 16, bidirectional=True),
    "lstm_projected": lambda: nn.LSTM(12, 16, num_layers=2, proj_size=5),
    "tanh": lambda: nn.RNN(12, 16, num_layers=2),
    "relu": lambda: nn.RNN(12, 16, nonlinearity="relu", bidirectional=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    pair = twins(LAYERS[name]().train())
    x = torch.randn(20, 24, 12).requires_grad_()

    def run(m: nn.Module) -> list[Any]:
        m.zero_grad()
        x.grad = None
        out, state = m(x)
        total((out, state)).backward()
        return [out, state, x.grad]

    pair.same(run)
    for m in (pair.plain, pair.hybrid):
        m.zero_grad()
    tighten(pair.hybrid)
    pair.same(run, seed=3)
    names = [str(n.target) for n in pair.hybrid.joint_graph.graph.nodes]
    n_layers = pair.plain.num_layers
    assert sum("recurrent_backward" in name for name in names) == n_layers
    assert len(names) < 60 * n_layers


@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_segments(name: str) -> None:
    """40 steps are segments of 16, 16 and 8: outputs have eager's bits, gradients are sums in another order."""
    pair = twins(LAYERS[name]().train(), compression="auto")
    x = torch.randn(40, 40, 12).requires_grad_()
    results = []
    for m in (pair.plain, pair.hybrid):
        torch.manual_seed(7)
        x.grad = None
        out, state = m(x)
        total((out[3:], state)).backward()
        results.append(([out, state], [x.grad, *(p.grad for p in m.parameters())]))
    (outputs, gradients), (found_outputs, found_gradients) = results
    assert_same(state_of(pair.plain, outputs), state_of(pair.plain, found_outputs))
    for expected, found in zip(gradients, found_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_segments_take_a_fraction_of_the_memory() -> None:
    # Backward holds 96 time steps of the layer at once, or 16 of them next to its output and that one's gradient.
    model, x = nn.GRU(16, 64).train(), torch.randn(96, 16, 16)
    rises = []
    for compression in ("lossless", "auto"):
        hybrid = fxhybrid.compile(model, budget=1.0, example_inputs=(x,), compression=compression)

        def step(hybrid: nn.Module = hybrid) -> None:
            model.zero_grad()
            total(hybrid(x)).backward()

        rises.append(measure_step(step, modules=hybrid, tensors=[x], repeats=0).rise_bytes)
    assert rises[1] < rises[0] / 2


def test_given_state_and_unbatched_input() -> None:
    pair = twins(nn.LSTM(12, 16, num_layers=2).train())
    h, c = torch.randn(2, 16).requires_grad_(), torch.randn(2, 16)
    x = torch.randn(30, 12)

    def run(m: nn.Module) -> list[Any]:
        m.zero_grad()
        h.grad = None
        out, _ = m(x, (h, c))
        total(out).backward()
        return [out, h.grad]

    pair.same(run)


def test_suite_model_keeps_its_budget() -> None:
    case = suite.load("gru", "small")
    eager = measure_step(lambda: case.loss().backward(), modules=case.model, tensors=case.tensors, repeats=0)
    case.model.zero_grad()
    pair = twins(case.model, example_inputs=case.inputs, loss_fn=case.loss_fn, loss_args=case.loss_args)
    budget = tighten(pair.hybrid)
    assert budget < 0.75 * eager.peak_bytes

    def step(m: nn.Module) -> Tensor:
        m.zero_grad()
        loss = m(*case.inputs, loss_args=case.loss_args) if m is pair.hybrid else case.loss(m)
        loss.backward()
        return loss

    pair.same(step)
    found = measure_step(lambda: step(pair.hybrid), modules=pair.hybrid, tensors=case.tensors, repeats=0)
    assert found.peak_bytes <= budget
    assert found.stray_bytes == 0


def test_packed_sequences_and_autocast_are_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(12, 16)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.gru(pack_padded_sequence(x, lengths))[1]

    x = torch.randn(20, 4, 12)
    with pytest.raises(CaptureError, match="pack"):
        fxhybrid.compile(Packed().train(), budget=1.0, example_inputs=(x, torch.tensor([20, 9, 9, 3])))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match="autocast"):
        fxhybrid.compile(nn.GRU(12, 16).train(), budget=1.0, example_inputs=(x,))
