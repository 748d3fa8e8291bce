"""Real training on simulated devices, the command line and the data that tasks are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fxhybrid.cli.main import main
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.model_arrays import leading_slice, to_arrays
from fxhybrid.federated.server.policies import Policy, Settings, policy_of
from fxhybrid.federated.simulation.experiment import Experiment, run_policy
from fxhybrid.federated.simulation.scenarios import Scenario
from fxhybrid.federated.tasks.data import ArrayData, capability_split, dirichlet_split, from_dataset
from fxhybrid.federated.tasks.tasks import text_task
from fxhybrid.suite.sample_data import consecutive_windows, library_packages

SCENARIO = Scenario("text", n_devices=6, capable_share=0.34)
SETTINGS = Settings(rounds=3, devices_per_round=3, local_steps=2)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment()


def test_a_run_learns_and_resumes_bit_exactly(experiment: Experiment, tmp_path: Path) -> None:
    policy = policy_of("fxhybrid")
    whole = run_policy(experiment, SCENARIO, policy, SETTINGS, checkpoint=tmp_path / "whole")
    assert whole.evaluate(whole.arrays).loss < whole.evaluate(to_arrays(text_task(6).make_model(1.0))).loss
    shorter = Settings(2, devices_per_round=3, local_steps=2)
    run_policy(experiment, SCENARIO, policy, shorter, checkpoint=tmp_path / "cut")
    resumed = run_policy(experiment, SCENARIO, policy, SETTINGS, checkpoint=tmp_path / "cut", resume=True)
    assert resumed.clock_s == whole.clock_s
    assert all(np.array_equal(resumed.arrays[name], array) for name, array in whole.arrays.items())
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_without_a_limit_nobody_dies_and_with_one_the_unmodified_step_does(experiment: Experiment) -> None:
    free = run_policy(experiment, SCENARIO, policy_of("no-limit"), SETTINGS)
    assert free.outcomes["oom"] == 0
    dying = run_policy(experiment, SCENARIO, policy_of("random"), SETTINGS)
    assert dying.outcomes["oom"] > 0


@pytest.mark.slow
def test_narrow_models_train_a_slice_of_the_wide_one(experiment: Experiment) -> None:
    policy = Policy("narrow", policy_of("heterofl").technique, "random", elastic=False, widths=(1.0, 0.5))
    settings = Settings(1, devices_per_round=6, local_steps=1)
    driver = experiment.driver(SCENARIO, policy, settings)
    before = dict(driver.arrays)
    driver.run()
    part = leading_slice(before, driver.scheduler.fleet.parts[0.5])
    assert {name: array.shape for name, array in part.items()} == {
        name: array.shape for name, array in driver.scheduler.fleet.parts[0.5].items()
    }
    assert driver.outcomes["ok"] > 0
    assert not np.array_equal(driver.arrays["head.weight"], before["head.weight"])


def test_the_command_runs_and_writes(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fxhybrid.federated.simulation.cli.Experiment", lambda: experiment
    )  # captured and planned already
    arguments = ["federated", "--task", "text", "--devices", "4", "--rounds", "1", "--per-round", "2"]
    arguments += ["--local-steps", "1", "--policies", "exclude", "--folder", str(tmp_path)]
    assert main(arguments) == 0
    assert "exclude" in capsys.readouterr().out
    assert json.loads((tmp_path / "exclude.jsonl").read_text())["policy"] == "exclude"
    assert main([*arguments, "--resume"]) == 0
    for other in (["--skew", "0.3"], ["--contention", "crowded"], ["--capable-share", "0.5"], ["--fleet", "phones"]):
        assert main([*arguments, "--resume", *other]) == 2
    assert main(["federated", "--policies", "none"]) == 2
    assert main(["federated", "--resume"]) == 2


LABELS = np.arange(1000) % 10


def test_splits_deal_out_every_example_once() -> None:
    for parts in (dirichlet_split(LABELS, 7, 0.1, 0), capability_split(LABELS, [True] * 2 + [False] * 5, 0.7, 0.3, 0)):
        assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
        assert min(len(part) for part in parts) >= 1


def test_full_skew_keeps_weak_devices_classes_from_strong_ones() -> None:
    strong, *weak = capability_split(LABELS, [True, False, False], 1.0, 1.0, 0)
    assert set(LABELS[strong].tolist()) == {0, 1, 2, 3, 4}
    assert set(LABELS[np.concatenate(weak)].tolist()) == {5, 6, 7, 8, 9}


def test_small_alpha_skews_more() -> None:
    def spread(alpha: float) -> float:
        parts = dirichlet_split(LABELS, 10, alpha, 0)
        return float(np.mean([len(set(LABELS[part].tolist())) for part in parts]))

    assert spread(0.05) < 0.7 * spread(100.0)


def test_batches_repeat_themselves_and_have_one_shape() -> None:
    data = ArrayData(torch.arange(5).unsqueeze(1), torch.arange(5))
    first, second = data.batches(4, (1,)), data.batches(4, (1,))
    for _ in range(4):
        x, y = next(first)
        assert x.shape == (4, 1)
        assert torch.equal(x, next(second)[0])
        assert torch.equal(x[:, 0], y)
    assert not torch.equal(next(data.batches(4, (1,)))[0], next(data.batches(4, (2,)))[0])
    with pytest.raises(InvalidArgument, match="one target"):
        ArrayData(torch.zeros(2), torch.zeros(3))


def test_windows_are_followed_by_their_next_bytes() -> None:
    inputs, targets = consecutive_windows(b"abcdefg", 3)
    assert inputs.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert targets.tolist() == [[98, 99, 100], [101, 102, 103]]
    packages = library_packages(5, 1000)
    assert len(packages) == 5
    assert {len(text) for text in packages.values()} == {1000}


class Columns:
    """What a Hugging Face ``Dataset`` offers here."""

    column_names = ("image", "label")

    def with_format(self, kind: str) -> dict[slice, object]:
        assert kind == "torch"
        return _All({"image": torch.full((3, 8, 8), 255, dtype=torch.uint8), "label": torch.arange(3)})


class _All(dict):  # type: ignore[type-arg]
    def __getitem__(self, key: object) -> object:
        return dict(self) if key == slice(None) else super().__getitem__(key)


def test_a_datasets_columns_become_tensors() -> None:
    data = from_dataset(Columns(), "image", "label")
    assert data.inputs.shape == (3, 1, 8, 8)
    assert data.inputs.unique().tolist() == [1.0]
    with pytest.raises(InvalidArgument, match="no column"):
        from_dataset(Columns(), "img", "label")
    with pytest.raises(InvalidArgument, match="no Hugging Face"):
        from_dataset([1, 2], "image", "label")
