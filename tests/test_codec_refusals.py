"""Why a tensor is offered no codec: the first rule that forbids it, in words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid.capture.capture import capture
from fxhybrid.capture.step import Step
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.codec_choices import codec_choices, codec_refusals
from fxhybrid.passes.storages import Layout, layout_of

SMALL = "it has {} bytes; below 4096 a codec's calls cost more than they save"
UNREAD = "no backward op reads it; rowwise8:64 is lossy, recomputing is exact"
OUTPUT = "it is an output, which the caller holds as it is until the step ends"


class Layers(nn.Module):
    """Linear, ReLU, Linear, sin; activations of 64 x 64 float32, 16 KiB, and a mask of 4 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(torch.sin(self.b(torch.relu(self.a(x)))))


def layout(rows: int = 64) -> Layout:
    return layout_of(canonicalize(capture(Step(Layers(), None, True), ((torch.randn(rows, 64),), {}, ())).joint))


def offered(layout: Layout, *, lossy: bool, lossless: bool) -> set[str]:
    return {layout.storages[t].name for t in codec_choices(layout, lossy=lossy, lossless=lossless)}


def test_the_first_rule_that_hits_is_named() -> None:
    found = layout()
    refused = codec_refusals(found, lossy=True, lossless=True)
    assert refused == {
        "addmm.default.0": UNREAD,  # the ReLU's input: its backward reads the mask, which is made of the output
        "addmm.default.1": "cos.default reads it, as argument 0, exactly; rowwise8:64 is lossy",
        "sin.default.0": UNREAD,  # the sigmoid's backward reads the output
        "sigmoid.default.0": OUTPUT,
    }
    assert offered(found, lossy=True, lossless=True) == {"relu.default.0", "keep_mask.default.0"}


def test_what_is_switched_off_is_said() -> None:
    found = layout()
    lossless = codec_refusals(found, lossy=False, lossless=True)
    assert lossless["relu.default.0"] == "rowwise8:64 would fit, but is lossy: that is switched off"
    assert offered(found, lossy=False, lossless=True) == {"keep_mask.default.0"}
    assert set(codec_refusals(found, lossy=False, lossless=False).values()) == {"compression is off"}


def test_small_tensors_are_refused_in_bytes() -> None:
    refused = codec_refusals(layout(rows=15), lossy=True, lossless=True)
    assert refused["relu.default.0"] == SMALL.format(15 * 64 * 4)
    assert refused["keep_mask.default.0"] == SMALL.format(15 * 64)


def test_a_mask_that_backward_reads_instead_is_named() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)).requires_grad_(False)
    model[0].requires_grad_(True)  # nobody needs the gradient of the last weight, so that nothing reads its input
    found = layout_of(canonicalize(capture(Step(model, None, True), ((torch.randn(64, 64),), {}, ())).joint))
    refused = codec_refusals(found, lossy=True, lossless=True)
    assert refused["relu.default.0"] == UNREAD.replace(";", ", but its mask keep_mask.default.0;")


def test_a_user_reads_the_refusals_from_the_module() -> None:
    hybrid = fxhybrid.compile(Layers(), budget=1.0, example_inputs=(torch.randn(64, 64),))
    refused = hybrid.compression_refusals
    assert refused["sigmoid.default.0"] == OUTPUT
    assert "relu.default.0" not in refused
    names = {tensor.name for tensor in hybrid.planning_problem.tensors}
    assert set(refused) <= names  # no parameter, buffer or input: nothing is stored of them
    hybrid = fxhybrid.compile(Layers(), budget=1.0, example_inputs=(torch.randn(64, 64),), compression="off")
    assert set(hybrid.compression_refusals.values()) == {"compression is off"}
