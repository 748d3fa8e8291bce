"""The commands and the code of docs/FEDERATED.md run as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxhybrid.cli.main import main
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.server.policies import Settings
from fxhybrid.federated.tasks.tasks import Task
from fxhybrid.suite.sample_data import Batch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "FEDERATED.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (fxhybrid federated .*)$", TEXT, re.M)
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
CODE = next(code for code in BLOCKS if "run_policy" in code)
GUEST = next(code for code in BLOCKS if "def make_task" in code)


def test_the_printed_command_and_code_have_the_same_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def refuse(experiment: object, scenario: object, policy: object, settings: Settings, **options: object) -> None:
        asked.append(settings)
        raise InvalidArgument("seen enough")

    monkeypatch.setattr("fxhybrid.federated.simulation.cli.run_policy", refuse)
    assert main(shlex.split(COMMANDS[0])[1:]) == 2
    printed = re.search(r"Settings\((.*?)\)", CODE)
    assert printed
    assert "deadline" not in printed[1]
    assert asked[0].deadline_s is Settings(1, devices_per_round=1).deadline_s


def test_the_path_of_the_app_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["federated", "app-path"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "pyproject.toml").exists()


def test_a_guests_task_is_made_as_printed() -> None:
    def batch(*_: int) -> Batch:
        return torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)

    scope = {"my_share": batch, "my_held_out_batch": batch, "make_model": lambda: nn.Linear(2, 3)}
    exec(GUEST, scope)
    task = scope["make_task"](2)  # type: ignore[operator]
    assert isinstance(task, Task)
    inputs, targets = task.example()
    assert task.loss_fn(task.make_model(1.0)(inputs), targets).isfinite()


@pytest.mark.slow
def test_commands_and_code_run_as_printed(tmp_path: Path) -> None:
    for command in [f"{sys.executable} -m {COMMANDS[0]}", f"{sys.executable} -c {shlex.quote(CODE)}"]:
        done = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
