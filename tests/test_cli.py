"""The command line and what it calls: plan, frontier, targets and the Dynamo backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxhybrid
from fxhybrid import Frontier, InvalidArgument, Plan
from fxhybrid.budget_sweep import FrontierRow, Technique
from fxhybrid.cli.main import FAILED, main, parse_budget
from fxhybrid.cli.model_spec import load_model_spec

FACTORIES = """
import torch
from torch import nn

def layers():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

def pair():
    return layers(), (torch.randn(2048, 64),)

def four():
    inputs, target = {"input": torch.randn(2048, 64)}, torch.zeros(2048).long()
    return layers(), inputs, nn.functional.cross_entropy, (target,)

def wrong():
    return 3

def frozen():
    return layers().eval(), (torch.randn(4, 64),)
"""


@pytest.fixture(autouse=True)
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module ``made_here`` in the current folder, and an own profile cache."""
    (tmp_path / "made_here.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_here", raising=False)


def test_plan_writes_a_plan_that_compile_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "made_here:four", "--budget", "0.8", "--solver", "mps", "--json", "plan.json"]) == 0
    assert "predicted peak" in capsys.readouterr().out
    plan = Plan.load("plan.json")
    assert plan.peak_bytes <= plan.budget_bytes
    target = load_model_spec("made_here:four")
    hybrid = fxhybrid.compile(
        target.model,
        budget=plan.budget_bytes,
        plan=plan,
        example_inputs=target.inputs,
        loss_fn=target.loss_fn,
        loss_args=target.loss_args,
    )
    assert hybrid.plan.actions == plan.actions


def test_plan_of_a_suite_model_without_loss_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mlp", "--size", "small", "--budget", "0.9", "--compression", "off"]) == 0
    assert "budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "mlp", "--budget", "12 parsecs"], "12 parsecs"),
        (["plan", "mlp", "--budget", "1.5"], "a float must be in (0, 1]"),
        (["plan", "nothing", "--budget", "0.5"], "no model 'nothing'"),
        (["plan", "nowhere:make", "--budget", "0.5"], "cannot import 'nowhere'"),
        (["plan", "made_here:absent", "--budget", "0.5"], "has no function 'absent'"),
        (["plan", "made_here:wrong", "--budget", "0.5"], "must return (model, inputs)"),
        (["plan", "made_here:frozen", "--budget", "0.5"], "call model.train() first"),
        (
            ["plan", "made_here:four", "--budget", "1KiB", "--solver", "mps"],
            "the smallest known plan peaks at",
        ),
        (["frontier", "made_here:pair", "--budgets", "0.5,nonsense"], "nonsense"),
        (["demo", "--shares", "2"], "between 0 and 1"),
        (["demo", "--steps", "0"], "at least 1"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == FAILED
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "fxhybrid plan bert --size small --budget 0.6" in capsys.readouterr().out


def test_the_package_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "fxhybrid", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"fxhybrid {fxhybrid.__version__}\n"), done.stderr
    command = [sys.executable, "-m", "fxhybrid", "plan", "nothing", "--budget", "0.5"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == FAILED


def test_budgets_from_the_shell() -> None:
    assert [parse_budget(text) for text in ("0.5", "1000", "512MiB")] == [0.5, 1000, "512MiB"]


def test_frontier_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["frontier", "made_here:four", "--json", "frontier.json", "--plot", "frontier.png"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("recompute only", "compress only", "lower", "1 MiB"))
    found = Frontier.from_json(Path("frontier.json").read_text(encoding="utf-8"))
    assert Path("frontier.png").stat().st_size > 5000
    assert len(found.budgets) == 12
    assert found.budgets[0] == found.save_all_bytes
    assert found.budgets[-1] == found.minimum_bytes
    hybrid = found.line(Technique.HYBRID)
    assert hybrid[0].added_s == 0
    assert all(row.peak_bytes is not None and row.peak_bytes <= row.budget_bytes for row in hybrid)
    added = [row.added_s for row in hybrid if row.added_s is not None]
    assert added == sorted(added)
    for best, *single in zip(*(found.line(technique) for technique in Technique), strict=True):
        for row in (best, *single):
            # what either technique reaches alone, both together reach no slower
            assert row.added_s is None or best.added_s <= row.added_s
            assert row.added_s is None or 0 <= row.lower_bound_s <= row.added_s
            assert (row.saved_s_per_mib is None) == (row.added_s is None)
    # at the smallest peak something must be added, and a little more memory would save some of it
    assert hybrid[-1].lower_bound_s > 0
    assert hybrid[-1].saved_s_per_mib > 0


def test_frontier_with_budgets_out_of_reach() -> None:
    target = load_model_spec("made_here:pair")
    found = fxhybrid.frontier(target.model, target.inputs, budgets=["1KiB", 1.0], compression="off")
    assert {row.technique for row in found.rows} == {Technique.HYBRID, Technique.RECOMPUTE}
    last = found.line(Technique.HYBRID)[-1]
    assert (last.budget_bytes, last.status, last.added_s) == (1024, "INFEASIBLE", None)
    assert last.lower_bound_s is None
    assert "not reached" in str(found)
    assert Frontier.from_json(found.to_json()) == found


def test_frontier_refuses_what_is_none() -> None:
    target = load_model_spec("made_here:pair")
    with pytest.raises(InvalidArgument, match="budgets is empty"):
        fxhybrid.frontier(target.model, target.inputs, budgets=[])
    for text in ("", "{}", '{"format": 1, "rows": [', '{"format": 2}', "[]"):
        with pytest.raises(InvalidArgument, match="not a frontier"):
            Frontier.from_json(text)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows = (FrontierRow(10, Technique.HYBRID, "OPTIMAL", 10, 0.0),)
    with pytest.raises(InvalidArgument, match=r"matplotlib: pip install 'fxhybrid\[demo\]'"):
        Frontier(rows, 10, 5, 1.0, "here").plot("x.png")


def test_dynamo_backend_matches_eager_within_its_budget() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
    )
    x = torch.randn(8, 3, 24, 24)

    def eager() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    peak_bytes = fxhybrid.measure_step(eager, modules=model, tensors=x, repeats=0).peak_bytes
    before = model[1].running_mean.clone()
    eager()
    expected = [p.grad for p in model.parameters()]
    after = model[1].running_mean.clone()
    options = {"budget": int(0.9 * peak_bytes), "compression": "lossless", "solver": "mps"}

    @torch.compile(backend="fxhybrid", fullgraph=True, options=options)
    def loss() -> torch.Tensor:
        return model(x).square().mean()

    def step() -> None:
        model.zero_grad()
        loss().backward()

    model[1].running_mean.copy_(before)
    step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert torch.equal(model[1].running_mean, after), "statistics moved once"
    measured = fxhybrid.measure_step(step, modules=model, tensors=x, repeats=0)
    assert measured.peak_bytes <= options["budget"] < peak_bytes


def test_dynamo_backend_needs_a_budget() -> None:
    from fxhybrid.integrations.dynamo_backend import fxhybrid_backend

    graph = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(InvalidArgument, match="512MiB"):
        fxhybrid_backend(graph, [])
    with pytest.raises(InvalidArgument, match="no option bugdet"):
        fxhybrid_backend(graph, [], options={"budget": 0.5, "bugdet": 1})
