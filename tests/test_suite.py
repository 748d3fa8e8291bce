"""Every small case of the suite runs a step, repeats itself by seed, and traces into one graph."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fxhybrid import suite
from fxhybrid.errors import InvalidArgument
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.suite import SuiteCase
from fxhybrid.suite.sample_data import smooth_images, word_ids

MIB = 1 << 20


def run_step(case: SuiteCase) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # dropout
    loss = case.loss()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}


@pytest.fixture(params=suite.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_step(name: str) -> None:
    case = suite.load(name, "small")
    loss, grads = run_step(case)
    assert case.name == name
    assert case.model.training
    assert loss.ndim == 0
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())
    unused = {key for key, _ in case.model.named_parameters()} - grads.keys()
    assert not unused


def test_same_seed_same_case(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (suite.load(name, "small", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global random state was moved"
    for mine, yours in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(mine, yours)
    for (key, mine), yours in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(mine, yours), key
    first_loss, first_grads = run_step(first)
    second_loss, second_grads = run_step(second)
    assert torch.equal(first_loss, second_loss)
    assert first_grads.keys() == second_grads.keys()
    assert not torch.equal(first_loss, run_step(other)[0])
    assert not torch.equal(first.inputs[0], other.inputs[0])


def test_activations_outweigh_parameters(name: str) -> None:
    # A share of the peak means something only where most of the peak can be planned.
    case = suite.load(name, "small")

    def step() -> None:
        case.model.zero_grad()
        case.loss().backward()

    measured = measure_step(step, modules=[case.model], tensors=case.tensors, repeats=0)
    fixed_bytes = 2 * sum(p.nbytes for p in case.model.parameters())  # with gradients
    assert measured.peak_bytes > 3 * MIB
    assert fixed_bytes < 0.45 * measured.peak_bytes
    assert measured.stray_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "full"])
def test_traces_into_one_graph(name: str, size: suite.Size) -> None:
    if name == "gru":
        pytest.skip("Dynamo refuses recurrent layers")
    case = suite.load(name, size)
    torch._dynamo.reset()
    compiled = torch.compile(case.loss, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.manual_seed(7)
    loss = compiled()
    loss.backward()
    traced = {key: p.grad for key, p in case.model.named_parameters()}
    eager_loss, grads = run_step(suite.load(name, size))
    assert torch.equal(loss, eager_loss)
    for key, grad in grads.items():
        assert torch.equal(traced[key], grad), key


def test_data_statistics() -> None:
    data = torch.Generator().manual_seed(0)
    images = smooth_images(4, 64, data)
    neighbours = torch.corrcoef(torch.stack([images[..., 1:].flatten(), images[..., :-1].flatten()]))[0, 1]
    assert images.mean().abs() < 0.01
    assert abs(images.std() - 1) < 0.01
    assert neighbours > 0.8
    ids = word_ids(16, 128, 500, data)
    assert ids.min() >= 10
    assert ids.max() < 500
    counts = ids.flatten().bincount(minlength=500)
    assert counts[10:20].sum() > 5 * counts[200:210].sum()


def test_full_sizes_are_as_promised() -> None:
    shapes = {name: tuple(suite.load(name).inputs[0].shape) for name in ("resnet50", "bert", "gpt2")}
    assert shapes == {"resnet50": (16, 3, 112, 112), "bert": (16, 128), "gpt2": (8, 256)}
    # torchvision's counts of the same two networks
    counts = {name: sum(p.numel() for p in suite.load(name).model.parameters()) for name in ("resnet50", "mobilenetv2")}
    assert counts == {"resnet50": 25_557_032, "mobilenetv2": 3_504_872}


def test_unknown_name_and_size() -> None:
    with pytest.raises(InvalidArgument, match="resnet50, mobilenetv2"):
        suite.load("resnet18")
    with pytest.raises(InvalidArgument, match='"full" or "small"'):
        suite.load("mlp", "tiny")  # type: ignore[arg-type]


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InvalidArgument, match=r"pip install 'fxhybrid\[demo\]'"):
        suite.load("bert", "small")
    assert suite.load("mlp", "small").model.training
