"""What planning learnt is kept on disk: a second start has the same plan without measuring or searching."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxhybrid
from fxhybrid.cli.main import main
from fxhybrid.codecs.kernels.cache_folder import cache_folder
from fxhybrid.compiler import first_plan
from fxhybrid.compiler.plan_cache import EARLIER
from fxhybrid.module import HybridModule
from fxhybrid.profiling import op_profiler
from fxhybrid.solvers.portfolio import extend_plans

X = torch.randn(512, 64)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())))


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def compiled(**options: object) -> HybridModule:
    given = {"budget": 0.6, "loss_fn": loss, **options}
    return fxhybrid.compile(model(), example_inputs=(X,), **given)  # type: ignore[arg-type]


def records() -> list[Path]:
    folder = cache_folder()
    assert folder is not None
    return sorted(folder.glob("plans-*.json"))


def check(hybrid: HybridModule) -> str:
    return hybrid.report().signatures[0].capture_check


def test_a_second_start_has_the_same_plan_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled()
    assert len(records()) == 1
    monkeypatch.setattr(first_plan, "reference", lambda *_: pytest.fail("runs the step to measure something"))
    monkeypatch.setattr(first_plan, "PlanMaker", lambda *_: pytest.fail("searches plans"))
    monkeypatch.setattr(op_profiler, "_measure", lambda _: pytest.fail("profiles operators"))
    for search in ("build_frontier", "MinPeakSolver", "polish"):
        monkeypatch.setattr(extend_plans, search, lambda *_, **__: pytest.fail("searches plans"))
    second = compiled()
    assert second.plan == first.plan
    assert check(second) == check(compiled()) == EARLIER + check(first)
    outputs = [hybrid(X).detach() for hybrid in (first, second)]
    assert torch.equal(*outputs)
    assert second.compression_refusals == first.compression_refusals


def test_stages_are_logged_with_their_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fxhybrid"):
        compiled()
        first = [record.message.split(":")[0] for record in caplog.records if record.name == "fxhybrid"]
        caplog.clear()
        compiled()
        second = [record.message.split(":")[0] for record in caplog.records if record.name == "fxhybrid"]
    assert first[:2] == ["capture", "profile"]
    assert "calibrate and search" in first
    assert "calibrate and search" not in second
    assert second[-1] == "rewrite"


def test_another_budget_starts_from_known_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()
    monkeypatch.setattr(first_plan, "PlanMaker", lambda *_: pytest.fail("searches a frontier again"))
    plan = compiled(budget=0.8).plan
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.gradient_error.source in ("measured", "exact")
    assert compiled(budget=0.8).plan == plan


def test_a_budget_error_keeps_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fxhybrid.BudgetError) as refused:
        compiled(budget=1000)
    monkeypatch.setattr(first_plan, "PlanMaker", lambda *_: pytest.fail("searches a frontier again"))
    assert compiled(budget=refused.value.minimum_bytes).plan.peak_bytes == refused.value.minimum_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lossless"},
        {"max_grad_error": 0.05},
        {"solver": "mps"},
        {"reserve_bytes": 64},
    ],
    ids=str,
)
def test_other_options_have_records_of_their_own(options: dict[str, object]) -> None:
    compiled()
    assert not check(compiled(**options)).startswith(EARLIER)
    assert len(records()) == 2


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-200])


def change(path: Path) -> None:
    raw = json.loads(path.read_text())
    raw["content"] = raw["content"].replace("0.", "1.", 1)
    path.write_text(json.dumps(raw))


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\x00")


@pytest.mark.parametrize("spoil", [cut, change, garble, Path.unlink], ids=["cut", "changed", "garbled", "gone"])
def test_a_spoilt_record_is_made_again(spoil: Callable[[Path], object]) -> None:
    first = compiled()
    spoil(records()[0])
    again = compiled()
    assert not check(again).startswith(EARLIER)
    assert again.plan.actions == first.plan.actions


def test_the_command_lists_and_clears(capsys: pytest.CaptureFixture[str]) -> None:
    compiled()
    main(["cache"])
    assert "plans and gradient errors" in capsys.readouterr().out
    main(["cache", "--clear"])
    assert "removed" in capsys.readouterr().out
    assert records() == []
