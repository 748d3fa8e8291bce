"""Convolutions in channels_last: laid out as said, equal but for rounding, planned to the byte."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxhybrid
from fxhybrid.accuracy.step_result import relative_difference
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.ir.plan import Tier
from fxhybrid.options import Options
from fxhybrid.passes.channels_last import channels_last_groups, is_channels_last
from fxhybrid.passes.traced import Traced
from fxhybrid.pipeline import trace_plain
from fxhybrid.profiling.allocator import measure_step
from fxhybrid.segments import segment
from tests.compare import same_at_both_budgets, twins

IMAGES = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
CHANNELS_LAST = torch.channels_last


class Mixed(nn.Module):
    """Convolutions of all kinds with what lies between them; then attention over pixels, which is none of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.strided = nn.Conv2d(16, 32, 2, stride=2)
        self.squeeze = nn.Conv2d(32, 32, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last = nn.Conv2d(32, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu6(self.norm(self.first(x)))
        b = F.hardswish(self.dilated(self.depthwise(a))) + a
        c = F.silu(self.strided(b))
        c = c * self.squeeze(c.mean((2, 3), keepdim=True)).sigmoid()
        d = torch.cat([self.up(c), F.interpolate(F.avg_pool2d(b, 2), scale_factor=2.0)], 1)
        e = F.max_pool2d(F.gelu(self.last(F.dropout(d, 0.1))), 3, 2, 1)
        tokens = e.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


def squared_step(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    output: Tensor = model(x)
    output.square().mean().backward()
    return output


def all_laid_out(model: nn.Module, *args: Tensor) -> Traced:
    """The model's step with every group of convolutions in channels_last, whether or not that is faster."""
    step = Step(model, None, False)
    traced = trace_plain(step, StepCall(args, {}, ()), Options.checked(budget=1.0, exact="reordered"))
    return traced.in_layout(tuple(group.number for group in channels_last_groups(traced.capture.joint)))


def test_only_what_comes_in_and_goes_out_is_converted() -> None:
    layers: list[nn.Module] = []
    for activation in (
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        nn.Hardswish(),
        nn.LeakyReLU(),
        nn.ELU(),
        nn.Mish(),
    ):
        layers += [nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), activation]
    joint = all_laid_out(nn.Sequential(*layers, nn.Conv2d(3, 3, 1)), IMAGES).joint
    clones = joint.module.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    images = [n for n in clones if n.meta["val"].shape[0] == len(IMAGES)]
    # the batch comes in, the output goes out, and its gradient comes in
    assert len(images) == 3
    run_checked(joint)


class StrideCheck(fx.Interpreter):
    """Runs a graph, and compares each tensor's strides with those of its fake value."""

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "call_function" and isinstance(found, Tensor):
            expected = n.meta["val"]
            pairs = zip(found.stride(), expected.stride(), found.shape, strict=True)
            assert all(a == b for a, b, size in pairs if size > 1), (n, found.stride(), expected.stride())
        return found


def run_checked(joint: JointGraph) -> None:
    values = [n.meta["val"] for n in joint.placeholders]
    with torch.no_grad():
        StrideCheck(joint.module).run(*(torch.rand(v.shape).to(v.dtype) for v in values))


@pytest.mark.parametrize("batch", [1, 4])
def test_kernels_lay_out_as_the_graph_says(batch: int) -> None:
    traced = all_laid_out(Mixed(), IMAGES[:batch])
    joint = traced.joint
    convolutions = joint.module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert len(convolutions) > 8  # those of the forward pass, and input gradients as transposed ones
    assert all(is_channels_last(n.meta["val"]) for n in convolutions)
    run_checked(joint)


@pytest.fixture(scope="module")
def plan() -> fxhybrid.Plan:
    """A plan for half of the peak with all groups in channels_last."""
    hybrid = fxhybrid.compile(Mixed(), budget=1.0, example_inputs=(IMAGES,), exact="reordered")
    laid_out = all_laid_out(Mixed(), IMAGES)
    saving_all = replace(hybrid.plan, actions={}, channels_last=laid_out.channels_last, budget_bytes=2**40)
    hybrid.use_plan(saving_all)
    hybrid.set_budget(int(0.6 * hybrid.plan.peak_bytes))
    return hybrid.plan


def test_peak_and_layouts(plan: fxhybrid.Plan) -> None:
    assert plan.channels_last == (0,)
    assert plan.exactness is Tier.REORDERED
    assert fxhybrid.Plan.from_json(plan.to_json()) == plan
    model = Mixed()
    plain = copy.deepcopy(model)
    hybrid = fxhybrid.compile(model, budget=plan.budget_bytes, example_inputs=(IMAGES,), exact="reordered", plan=plan)
    assert "in channels_last" in hybrid.report().signatures[0].capture_check

    def step() -> None:
        model.zero_grad()
        hybrid(IMAGES).square().sum().backward()

    found = measure_step(step, modules=model, tensors=[IMAGES])
    # The plan counts the output and its gradient (4 rows of 10 floats each) as held to the end, where the caller drops
    # one and the other dies at its last use; the loss is the caller's.
    assert found.peak_bytes == hybrid.plan.peak_bytes - 2 * 4 * 10 * 4 + 2 * 4
    results = {}
    for name, run in (("planned", hybrid), ("eager", plain)):
        torch.manual_seed(0)
        run.zero_grad()
        output = run(IMAGES)
        output.square().sum().backward()
        results[name] = output, {key: p.grad for key, p in run.named_parameters()}
    (output, gradients), (expected, eager) = results["planned"], results["eager"]
    assert output.stride() == expected.stride()
    for key, gradient in gradients.items():
        like = eager[key]
        assert gradient is not None
        assert like is not None
        assert gradient.stride() == like.stride(), key
    assert relative_difference(gradients, eager) < 1e-2  # 1e-6 to 5e-4 where another pixel wins in a pool


def test_lossless_keeps_the_layout(plan: fxhybrid.Plan) -> None:
    hybrid = fxhybrid.compile(Mixed(), budget=1.0, example_inputs=(IMAGES,), compression="lossless")
    assert hybrid.plan.exactness is Tier.LOSSLESS
    assert not hybrid.plan.channels_last
    with pytest.raises(fxhybrid.PlanMismatchError, match="rounds otherwise"):
        hybrid.use_plan(plan)


def test_models_in_channels_last_have_no_groups() -> None:
    model = Mixed().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    assert all_laid_out(model, IMAGES.contiguous(memory_format=CHANNELS_LAST)).channels_last == ()


def test_lossless_models_in_channels_last_keep_eagers_bits() -> None:
    plain = Mixed().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    x = IMAGES.contiguous(memory_format=CHANNELS_LAST)
    pair = twins(plain)
    same_at_both_budgets(pair, lambda: pair.same(lambda model: squared_step(model, x)))


@pytest.mark.parametrize("n_groups", [1, 2, 4, 8])
@pytest.mark.parametrize("n_out", [8, 16])
def test_lossless_groups_of_convolutions_keep_eagers_bits(n_groups: int, n_out: int) -> None:
    """The gradient of the input alone is another kernel of oneDNN for most groups in channels_last."""
    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, n_out, 3, padding=1, groups=n_groups)
    pair = twins(nn.Sequential(*layers).to(memory_format=CHANNELS_LAST))  # type: ignore[call-overload]
    x = IMAGES.contiguous(memory_format=CHANNELS_LAST)
    same_at_both_budgets(pair, lambda: pair.same(lambda model: squared_step(model, x)))


def test_batch_norm_some_pixels_at_a_time() -> None:
    """One channel far from 0, whose sums would cancel if the mean were taken off late."""
    x = torch.randn(8, 96, 40, 20).contiguous(memory_format=CHANNELS_LAST)
    x[:, 1] += 100
    gradient, weight = torch.randn_like(x), torch.rand(96)
    _, mean, invstd = torch.native_batch_norm(x, weight, None, None, None, True, 0.1, 1e-5)
    doubles = (t.double() for t in (gradient, x, weight))
    statistics = mean.double(), invstd.double()
    whole = torch.ops.aten.native_batch_norm_backward
    expected = whole(*doubles, None, None, *statistics, True, 1e-5, [True] * 3)
    found = torch.ops.fxhybrid.batch_norm_backward(gradient, x, weight, mean, invstd, 1e-5, [True] * 3)
    assert found[0].stride() == x.stride()
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


class InParts(nn.Module):
    """Convolutions with a break behind the first ones, so that there are two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x).mean((2, 3))  # type: ignore[no-any-return]


def test_several_graphs_are_compared_with_eager_in_its_own_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In others, rounding is all that differs, and where batch norm cancels much it is a lot."""

    def all_groups(joint: JointGraph, _: JointGraph) -> tuple[int, ...]:  # whether or not that is faster
        return tuple(group.number for group in channels_last_groups(joint))

    monkeypatch.setattr(segment, "groups_that_pay", all_groups)
    hybrid = fxhybrid.compile(InParts(), budget=1.0, example_inputs=(IMAGES,))
    check = hybrid.report().signatures[0].capture_check
    assert check.startswith("bit-equal")
    assert "with convolutions in channels_last gradients differ by" in check
