"""Explanations of a plan: tables by module and line, memory by kind, pictures and the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxhybrid
from fxhybrid.compiler.explained import _planned_step
from fxhybrid.errors import InvalidArgument
from fxhybrid.explain.explanation import Explanation, joined
from fxhybrid.explain.memory_timeline import memory_timelines
from fxhybrid.explain.planned_step import PlannedStep
from fxhybrid.module import HybridModule


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.named = nn.ModuleDict({"head": nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.named["head"](x)


@pytest.fixture(scope="module")
def hybrid() -> HybridModule:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    example = torch.randn(256, 32)
    labels = torch.randint(10, (256,))
    return fxhybrid.compile(
        model, budget=0.7, example_inputs=(example,), loss_fn=F.cross_entropy, loss_args=(labels,), optimizer=optimizer
    )


@pytest.fixture(scope="module")
def explanation(hybrid: HybridModule) -> Explanation:
    return hybrid.explain()


@pytest.fixture(scope="module")
def step(hybrid: HybridModule) -> PlannedStep:
    return _planned_step(hybrid._fxhybrid_session.first)


def test_places_are_the_models_modules_and_lines(hybrid: HybridModule, explanation: Explanation) -> None:
    paths = {name for name, _ in hybrid.named_modules()} | {"loss"}
    assert {place.place.module for place in explanation.places} <= paths
    lines = {place.place.module: place.place.line for place in explanation.places}
    assert re.fullmatch(r"test_explain\.py:\d+", lines["blocks.1.wide"])
    kinds = {place.place.module: place.place.kind for place in explanation.places}
    assert (kinds["blocks.0.wide"], kinds["named.head.0"]) == ("Linear", "LayerNorm")


def test_sums_are_the_plans(explanation: Explanation, step: PlannedStep) -> None:
    plan = explanation.plan
    values = step.unmodified.schedule.values
    kept_bytes = sum(values[number].size_bytes for number in step.unmodified.schedule.stored)
    assert sum(place.kept_before_bytes for place in explanation.places) == kept_bytes
    assert sum(place.overhead_s for place in explanation.places) == pytest.approx(plan.added_s, abs=1e-4)
    alive = sum(place.peak_bytes for place in explanation.places) + explanation.workspace_bytes
    assert alive + step.problem.backward_base_bytes == plan.peak_bytes  # this step peaks in its backward pass
    assert sum(explanation.resident.values()) == step.problem.resident_bytes
    assert sum(sum(place.actions.values()) for place in explanation.places) == len(plan.actions) > 0
    names = [name for place in explanation.places for name in place.names]
    assert sorted(names) == sorted(step.problem.tensors[values[n].tensor].name for n in step.unmodified.schedule.stored)


def test_layers_of_a_stack_are_joined(explanation: Explanation) -> None:
    wide = [place for place in explanation.places if place.place.module.endswith("wide")]
    (one,) = [place for place in joined(explanation.places) if place.place.module == "blocks.*.wide"]
    assert (one.count, one.kept_before_bytes) == (3, sum(place.kept_before_bytes for place in wide))
    assert "3 x blocks.*.wide" in str(explanation)


def test_kinds_sum_up_to_the_simulated_height(step: PlannedStep) -> None:
    for timeline, simulated in zip(memory_timelines(step), (step.unmodified, step.planned), strict=True):
        heights = sum(timeline.bytes_of.values())
        assert (heights == simulated.timeline.during_bytes).all()
        assert min(bytes_.min() for bytes_ in timeline.bytes_of.values()) >= 0
        assert timeline.bytes_of["optimizer state"][0] > timeline.bytes_of["parameters"][0] > 0
        assert timeline.bytes_of["gradients"][-1] == timeline.bytes_of["parameters"][0]
    # "blocks" alone would hold more than 60 % of what is kept
    assert {"blocks.0", "blocks.1", "blocks.2", "named.head"} <= set(timeline.kinds)


def test_pictures_and_page(hybrid: HybridModule, tmp_path: Path) -> None:
    hybrid.plot_memory(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    report = hybrid.report(html=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing outside the file
    for text in ("fxhybrid: Net", "max_grad_error", "blocks.*.wide", "predicted peak"):
        assert text in page
    assert "<pre>" in report._repr_html_()


def test_nothing_to_explain_before_the_first_call() -> None:
    hybrid = fxhybrid.compile(Net(), budget=1.0)
    for ask in (hybrid.explain, lambda: hybrid.plot_memory("x.png"), lambda: hybrid.report(html="x.html")):
        with pytest.raises(InvalidArgument, match="nothing is planned yet"):
            ask()
