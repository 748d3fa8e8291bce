"""The driver: rounds go on whatever devices do, and a run that was cut off goes on bit-exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fxhybrid.errors import InvalidArgument, PlanMismatchError
from fxhybrid.federated.client.local_steps import LocalWork
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.server.fleet_planner import FleetPlanner, Technique
from fxhybrid.federated.server.policies import POLICIES, Policy, policy_of
from fxhybrid.federated.tasks.captured_step import capture_step
from tests.federated_parts import adds_one, device, driver_of, report, tiny_task


@pytest.fixture(scope="module")
def planner() -> FleetPlanner:
    return FleetPlanner.of(capture_step(tiny_task())[1], technique=Technique.HYBRID)


def changed(**changes: object) -> Callable[[Request], Reply]:
    return lambda request: dataclasses.replace(adds_one(request), **changes)  # type: ignore[arg-type]


def raising(error: Exception) -> Callable[[Request], Reply]:
    def train(request: Request) -> Reply:
        raise error

    return train


def test_rounds_average_and_advance_the_clock(planner: FleetPlanner) -> None:
    driver = driver_of(planner, {name: device() for name in "abc"})
    records = driver.run()
    assert [r.round for r in records] == [1, 2, 3]
    assert [list(r.outcomes) for r in records] == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert driver.arrays["w"].tolist() == [3, 3, 3]  # every round adds 1
    assert driver.clock_s == 30.0  # each lasts the 10 s of its devices


@pytest.mark.parametrize(
    ("train", "outcome"),
    [
        (raising(MemoryError("no room")), "oom"),
        (raising(PlanMismatchError("another graph")), "refused"),
        (raising(KeyError("x")), "failed"),
        (lambda request: failed(request, Outcome.LOST, 5.0, "killed"), "lost"),
        (changed(elapsed_s=101.0), "late"),
        (changed(arrays={"w": np.full(3, np.nan, np.float32)}), "invalid"),
        (changed(arrays={"w": np.ones(4, np.float32)}), "invalid"),
        (changed(payload={}), "invalid"),
        (changed(payload={"n_examples": 10**30, "loss": 1.0, "squared_loss": 1.0}), "invalid"),
    ],
)
def test_bad_devices_do_not_touch_the_model(
    planner: FleetPlanner, train: Callable[[Request], Reply], outcome: str
) -> None:
    driver = driver_of(planner, {"bad": device(train), "good": device()}, rounds=2)
    records = driver.run()
    assert [r.outcomes for r in records] == [{"bad": outcome, "good": "ok"}] * 2
    assert driver.arrays["w"].tolist() == [2, 2, 2]


def test_a_round_in_which_all_fail_leaves_the_model_alone(planner: FleetPlanner) -> None:
    driver = driver_of(planner, {name: device(raising(MemoryError())) for name in "ab"}, rounds=1)
    driver.run()
    assert driver.arrays["w"].tolist() == [0, 0, 0]


def test_malformed_reports_keep_a_device_out(planner: FleetPlanner) -> None:
    def lying(request: Request) -> Reply:
        return report(request, [[request.now_s, 1 << 40]], n_examples=-5)

    driver = driver_of(planner, {"liar": lying, "good": device()}, rounds=1)
    assert driver.run()[0].outcomes == {"good": "ok"}


def test_nobody_there_is_a_round_without_change(planner: FleetPlanner) -> None:
    driver = driver_of(planner, {"poor": device(available_bytes=1)}, rounds=2)
    assert [r.outcomes for r in driver.run()] == [{}, {}]
    assert driver.clock_s == 200.0  # twice the deadline


def test_the_gate_keeps_out_whom_no_plan_fits(planner: FleetPlanner) -> None:
    handlers = {"poor": device(available_bytes=1), "rich": device()}
    assert driver_of(planner, handlers, rounds=1).run()[0].outcomes == {"rich": "ok"}
    open_policy = Policy("open", forecast="last", gate=False)
    assert set(driver_of(planner, handlers, rounds=1, policy=open_policy).run()[0].outcomes) == {"poor", "rich"}


def test_a_round_waits_only_for_as_many_as_it_needs(planner: FleetPlanner) -> None:
    slow = changed(elapsed_s=90.0)
    driver = driver_of(planner, {"a": device(slow), "b": device(), "c": device()}, rounds=1, over_selection=1.5)
    driver.run()
    assert driver.clock_s == 10.0
    assert driver.scheduler.records["a"].times_selected == 1


def test_devices_get_plans_for_their_own_memory(planner: FleetPlanner) -> None:
    seen: dict[str, LocalWork] = {}

    def noting(request: Request) -> Reply:
        seen[request.device] = LocalWork.from_payload(request.payload)
        return adds_one(request)

    full, profile_low = planner.save_all_bytes, int(planner.save_all_bytes * 0.8)
    driver_of(planner, {"rich": device(noting, full), "poor": device(noting, profile_low)}, rounds=1).run()
    assert seen["poor"].plans[0].peak_bytes <= profile_low < seen["rich"].plans[0].peak_bytes <= full
    for work in seen.values():
        peaks = [plan.peak_bytes for plan in work.plans]
        assert peaks == sorted(set(peaks), reverse=True)
    assert len(seen["rich"].plans) > 1


def test_overhead_is_taken_off_the_forecast(planner: FleetPlanner) -> None:
    handlers = {"rich": device(available_bytes=planner.save_all_bytes)}
    driver = driver_of(planner, handlers, rounds=1, overhead_bytes=planner.save_all_bytes)
    assert driver.run()[0].outcomes == {}


def test_misses_are_told_to_the_forecaster(planner: FleetPlanner) -> None:
    def dying(request: Request) -> Reply:
        return failed(request, Outcome.OOM, 4.0, "no room")

    driver = driver_of(planner, {"a": device(dying), "b": device()}, rounds=1)
    told = []
    driver.scheduler.forecaster.report_miss = lambda device, t_s: told.append((device, t_s))  # type: ignore[method-assign]
    driver.run()
    assert told == [("a", 4.0)]


def test_the_log_has_a_line_for_each_round(planner: FleetPlanner, tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    driver_of(planner, {"a": device(raising(MemoryError("no room"))), "b": device()}, log=log).run()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[0]["replies"]["a"]["detail"] == "MemoryError: no room"
    assert lines[0]["counted"] == ["b"]
    assert lines[0]["selections"][0]["factors"]["a"] == {"score": 1.0, "chosen": 1.0}


def noisy(request: Request) -> Reply:
    """Training whose result and time depend on device and round."""
    random = np.random.default_rng([request.round, *request.device.encode()])
    arrays = {
        name: array + random.normal(size=array.shape).astype(array.dtype) for name, array in request.arrays.items()
    }
    payload = {"n_examples": int(random.integers(1, 99)), "loss": 1.0, "squared_loss": float(random.random())}
    return Reply(request.device, request.round, Outcome.OK, float(random.uniform(1, 120)), payload, arrays)


def test_a_resumed_run_equals_one_that_was_not_cut_off(planner: FleetPlanner, tmp_path: Path) -> None:
    handlers = {name: device(noisy) for name in "abcde"}

    def make(folder: str, rounds: int) -> object:
        return driver_of(
            planner, handlers, rounds=rounds, log=tmp_path / folder / "log", checkpoint=tmp_path / folder / "state"
        )

    whole = make("whole", 7)
    whole.run()  # type: ignore[attr-defined]
    make("cut", 3).run()  # type: ignore[attr-defined]
    log = tmp_path / "cut" / "log"
    log.write_text(log.read_text() + json.dumps({"round": 4, "lost": True}) + '\n{"rou')  # died in round 4
    resumed = make("cut", 7)
    resumed.resume()  # type: ignore[attr-defined]
    resumed.run()  # type: ignore[attr-defined]
    assert log.read_bytes() == (tmp_path / "whole" / "log").read_bytes()
    assert (tmp_path / "cut" / "state").read_bytes() == (tmp_path / "whole" / "state").read_bytes()


def test_another_runs_checkpoint_is_refused(planner: FleetPlanner, tmp_path: Path) -> None:
    handlers = {"a": device(), "b": device()}
    driver_of(planner, handlers, checkpoint=tmp_path / "state").run()
    with pytest.raises(InvalidArgument, match="another run"):
        driver_of(planner, handlers, checkpoint=tmp_path / "state", seed=5).resume()
    (tmp_path / "state").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InvalidArgument, match="no checkpoint"):
        driver_of(planner, handlers, checkpoint=tmp_path / "state").resume()
    with pytest.raises(InvalidArgument, match="no checkpoint"):
        driver_of(planner, handlers).resume()


def test_settings_and_policies_are_checked(planner: FleetPlanner) -> None:
    with pytest.raises(InvalidArgument, match="rounds"):
        driver_of(planner, {}, rounds=0)
    with pytest.raises(InvalidArgument, match="heterofl"):
        policy_of("unheard of")
    assert {"fxhybrid", "exclude", "random", "oort-fedprox", "recompute-only", "no-limit"} <= set(POLICIES)


def test_devices_with_much_data_count_once(planner: FleetPlanner) -> None:
    def trained(value: float, n_examples: int) -> Callable[[Request], Reply]:
        payload = {"n_examples": n_examples, "loss": 1.0, "squared_loss": 1.0}
        return device(changed(arrays={"w": np.full(3, value, np.float32)}, payload=payload))

    handlers = {"much": trained(4.0, 30), "little": trained(0.0, 10)}
    for selector, mean in (("random", 3.0), ("utility", 2.0)):  # 30 of 40 examples; one of two devices
        driver = driver_of(planner, handlers, rounds=1, policy=Policy("test", forecast="last", selector=selector))
        driver.run()
        assert driver.arrays["w"].tolist() == [mean] * 3


def test_requests_of_one_round_are_of_one_kind(planner: FleetPlanner) -> None:
    kinds: list[Kind] = []

    def noting(request: Request) -> Reply:
        kinds.append(request.kind)
        return device()(request)

    driver_of(planner, {"a": noting, "b": noting}, rounds=1).run()
    assert kinds == [Kind.REPORT, Kind.REPORT, Kind.TRAIN, Kind.TRAIN]
