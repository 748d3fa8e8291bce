"""The demo end to end with a few steps, and the data that it trains on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fxhybrid.cli.main import FAILED, main
from fxhybrid.demo import Run, run_demo
from fxhybrid.demo.demo_tasks import digits_task, text_task
from fxhybrid.demo.show import budget_text
from fxhybrid.demo.train import train_task


def test_digits_keep_their_budget_and_their_data(tmp_path: Path) -> None:
    console = Console(width=140, record=True, quiet=True)
    task = digits_task()
    unmodified, tight = train_task(task, [0.6], 11, console)
    assert unmodified.budget_bytes is None
    assert tight.budget_bytes is not None
    assert tight.peak_bytes <= tight.budget_bytes < unmodified.peak_bytes
    # Same weights, same first batch; convolutions may run in channels_last, which rounds in another way.
    assert tight.losses[0] == pytest.approx(unmodified.losses[0], rel=1e-5)
    assert abs(tight.losses[-1] - unmodified.losses[-1]) < 0.5
    assert unmodified.losses[-1] < unmodified.losses[0]


def test_batches_repeat_and_held_out_is_apart() -> None:
    for task in (digits_task(), text_task()):
        first, again = next(task.batches()), next(task.batches())
        assert torch.equal(first[0], again[0])
        same = zip(task.make_model().parameters(), task.make_model().parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    digits = digits_task()
    n_held_out = len(digits.held_out[0][0])
    trained = {image.numpy().tobytes() for _, (x, _) in zip(range(40), digits.batches(), strict=False) for image in x}
    common = sum(image.numpy().tobytes() in trained for image in digits.held_out[0][0])
    assert n_held_out > 300
    assert common <= 2, "but for digits that are drawn alike"


def test_text_is_python_source_and_targets_are_the_next_bytes() -> None:
    inputs, target = next(text_task().batches())
    assert torch.equal(inputs[:, 1:], target[:, :-1])
    assert b"self" in bytes(
        torch.cat([b[0].flatten() for _, b in zip(range(20), text_task().batches(), strict=False)]).tolist()
    )


def test_budget_out_of_reach_is_said() -> None:
    run = Run("digits", 0.2, 43, 42, 100, 1.0, 0.0, 1.0, "", (1.0,))
    assert budget_text(run) == "43 B (43%, 20% is out of reach)"


@pytest.mark.parametrize(("module", "package"), [("sklearn.datasets", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_packages(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == FAILED
    assert f"the demo needs the package {package}: pip install 'fxhybrid[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_demo(tmp_path: Path) -> None:
    console = Console(width=140, record=True, quiet=True)
    plot = tmp_path / "demo.png"
    runs = run_demo(console, steps=5, plot=plot)
    assert [run.share for run in runs] == [None, 0.6, 0.4] * 2
    assert all(run.peak_bytes <= run.budget_bytes for run in runs if run.budget_bytes is not None)
    assert plot.stat().st_size > 10_000
