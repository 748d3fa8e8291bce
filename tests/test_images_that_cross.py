"""Images go from graph to graph of a step in channels_last where both compute in it and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import graph_break

import fxhybrid
from fxhybrid import BudgetError, HybridModule
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.passes.channels_last import channels_last_groups
from fxhybrid.segments import segment
from fxhybrid.segments.segmented_step import IN_CHANNELS_LAST, STRAIGHT
from tests.compare import MARGIN

N_STAGES = 3
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def all_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes channels_last wherever there are convolutions, whether or not it is faster."""

    def all_groups(joint: JointGraph, _: JointGraph) -> tuple[int, ...]:
        return tuple(group.number for group in channels_last_groups(joint))

    monkeypatch.setattr(segment, "groups_that_pay", all_groups)


class Stages(nn.Module):
    """Stages of convolutions, with Python between them."""

    def __init__(self, between: Callable[[Tensor], Any] = lambda _: graph_break()) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [3, 8, 8, 8]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
            for n in widths[:N_STAGES]
        )
        self.between = between
        self.skipped: int | None = None
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        """Computes numbers, one for each image and channel."""
        for i, stage in enumerate(self.stages):
            if i == self.skipped:
                continue
            x = stage(x)
            found = self.between(x)
            x = found if isinstance(found, Tensor) else x
        return x.view(len(x), -1).tanh()


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def compiled(model: nn.Module, **options: Any) -> HybridModule:
    return fxhybrid.compile(
        model, **{"budget": 1.0, "example_inputs": (IMAGES,), "loss_fn": loss_of, "exact": "reordered"} | options
    )


def gradients(model: nn.Module) -> list[Tensor]:
    loss = model(IMAGES) if isinstance(model, HybridModule) else loss_of(model(IMAGES))
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


class Look:
    """Is Python between graphs, which looks at the layout of what it gets."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda _: None) -> None:
        self.change = change
        self.in_channels_last: list[bool] = []

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Any:
        self.in_channels_last.append(not x.is_contiguous())
        return self.change(x)

    def of_step(self, hybrid: HybridModule) -> list[bool]:
        """Returns what it sees in a step."""
        self.in_channels_last.clear()
        gradients(hybrid)
        return self.in_channels_last


def test_images_cross_where_both_graphs_compute_in_channels_last() -> None:
    look = Look()
    hybrid = compiled(Stages(look))
    assert look.of_step(hybrid) == [True, True, False]  # the last one is read as it is laid out
    expected = gradients(Stages())
    assert_close(gradients(hybrid), expected)
    for _ in range(STRAIGHT):
        gradients(hybrid)
    planned = hybrid.plan.peak_bytes
    assert measured(hybrid) == planned
    with pytest.raises(BudgetError) as caught:
        hybrid.set_budget(1)
    hybrid.set_budget(int(MARGIN * caught.value.minimum_bytes))
    assert look.of_step(hybrid) == [True, True, False]
    assert_close(gradients(hybrid), expected)
    assert measured(hybrid) <= hybrid.plan.budget_bytes < planned


def measured(hybrid: HybridModule) -> int:
    def step() -> None:
        hybrid(IMAGES).backward()
        hybrid.zero_grad()

    return fxhybrid.measure_step(step, modules=hybrid, tensors=IMAGES, repeats=0).peak_bytes


def test_without_reordering_they_do_not() -> None:
    look = Look()
    assert look.of_step(compiled(Stages(look), exact=None, compression="lossless")) == [False] * N_STAGES


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.view(-1).sum().item(),
        lambda x: F.dropout(x, 0.5),
        lambda x: torch.as_strided(x, x.shape, (1, 4, 32, 512)).contiguous(),
    ],
    ids=["view", "random numbers in the order of memory", "memory itself"],
)
def test_python_that_would_make_something_else_of_them_gets_the_usual_layout(change: Callable[[Tensor], Any]) -> None:
    look = Look(change)
    hybrid = compiled(Stages(look))
    assert look.of_step(hybrid) == [False] * N_STAGES
    plain = Stages(look)
    torch.manual_seed(3)
    found = gradients(hybrid)
    torch.manual_seed(3)
    assert_close(found, gradients(plain))


@pytest.mark.parametrize("n_before", [1, STRAIGHT + 1])
def test_a_view_that_python_takes_later(n_before: int) -> None:
    """The step is begun again while copies are kept that allow it; else it ends, and the next one is right."""
    look = Look()
    hybrid = compiled(Stages(look))
    for _ in range(n_before):
        gradients(hybrid)
    look.change = lambda x: x.view(-1).sum().item()
    if n_before > STRAIGHT:
        with pytest.raises(RuntimeError, match="view size") as caught:
            gradients(hybrid)
        assert caught.value.__notes__ == [IN_CHANNELS_LAST]
        del caught  # its frames hold what the step stored
    assert_close(gradients(hybrid), gradients(Stages()))
    assert look.of_step(hybrid) == [False] * N_STAGES


def test_on_another_path_they_are_put_back() -> None:
    look, model = Look(), Stages()
    model.between = look
    hybrid = compiled(model, budget="1MB")
    for _ in range(STRAIGHT + 1):
        gradients(hybrid)
    for skipped in (1, None, 2, None):
        model.skipped = skipped
        plain = Stages()
        plain.skipped = skipped
        for _ in range(2):
            assert_close(gradients(hybrid), gradients(plain))
            assert measured(hybrid) <= hybrid.plan.budget_bytes
    assert look.of_step(hybrid) == [False] * N_STAGES
