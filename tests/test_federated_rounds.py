"""Rounds over time: over-selection, partial work, asynchronous rounds, and what the server learns from answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.client.local_steps import LocalWork, local_steps
from fxhybrid.federated.client.training_reply import LocalResult
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.server.aggregation import kept_by_step, rebased
from fxhybrid.federated.server.driver import Driver
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.server.policies import Policy, Settings, policy_of
from fxhybrid.federated.server.run_log import RoundRecord
from fxhybrid.federated.simulation.failures import retimed_s
from fxhybrid.federated.tasks.captured_step import capture_step
from fxhybrid.ir.plan import Plan
from tests.federated_parts import adds_one, device, driver_of, tiny_task

BUFFERED = Policy("test-async", forecast="last", is_async=True)


@pytest.fixture(scope="module")
def planner() -> FleetPlanner:
    return FleetPlanner.of(capture_step(tiny_task())[1])


def after(elapsed_s: float, **payload: float) -> Callable[[Request], Reply]:
    """Training that adds 1 to every number in so many seconds."""

    def train(request: Request) -> Reply:
        done = adds_one(request)
        return dataclasses.replace(done, elapsed_s=elapsed_s, payload={**done.payload, **payload})

    return device(train)


def test_rounds_ask_more_than_they_need_and_take_the_first(planner: FleetPlanner) -> None:
    handlers = {"a": after(30.0), "b": after(10.0), "c": after(20.0), "d": after(40.0)}
    driver = driver_of(planner, handlers, rounds=1, devices_per_round=3, over_selection=1.3)
    # 1.3 x 3 = 3.9, so four are asked; the third answer comes after 30 s
    assert driver.run()[0].outcomes == {"b": "ok", "c": "ok", "a": "ok", "d": "unused"}
    assert driver.clock_s == 30.0


def test_a_device_that_never_answers_is_asked_ever_less(planner: FleetPlanner) -> None:
    def silent(request: Request) -> Reply:
        return failed(request, Outcome.LATE, request.deadline_s, "")

    handlers = {"silent": device(silent), "a": device(), "b": device()}
    driver = driver_of(planner, handlers, rounds=60, devices_per_round=3)
    asked = [record.round for record in driver.run() if "silent" in record.outcomes]
    assert asked == [1, 2, 4, 8, 16, 32]  # after the first failure at once, then 1, 3, 7, 15, 31 rounds' rest
    driver.transport.handlers["silent"] = device()  # type: ignore[attr-defined]
    driver.scheduler.settings = dataclasses.replace(driver.scheduler.settings, rounds=66)
    assert ["silent" in record.outcomes for record in driver.run()] == [False] * 3 + [True] * 3


def test_answers_correct_speed_and_link(planner: FleetPlanner) -> None:
    # told: 1e6 bytes/s, slowdown 1. Measured: 10 s of which 4 s were training; 24 bytes in the other 6 s: 4 bytes/s
    driver = driver_of(planner, {"a": after(10.0, busy_s=4.0, slowdown=3.0)}, rounds=1)
    driver.run()
    record = driver.scheduler.records["a"]
    assert record.correction == 3.0
    assert record.bytes_per_s == pytest.approx(math.sqrt(1e6 * 4))  # half-way between both, as ratios
    plan = driver.scheduler.round_plans(["a"], 0.0)[0]
    untold = dataclasses.replace(record, slowdown=None)
    driver.scheduler.records["a"] = untold
    other = driver.scheduler.round_plans(["a"], 0.0)[0]
    assert plan.candidate.predicted_step_s == pytest.approx(3 * other.candidate.predicted_step_s)


def test_impossible_measurements_are_left_out(planner: FleetPlanner) -> None:
    driver = driver_of(planner, {"a": after(10.0, busy_s=-4.0, slowdown=math.inf)}, rounds=1)
    driver.run()
    assert (driver.scheduler.records["a"].correction, driver.scheduler.records["a"].bytes_per_s) == (
        1.0,
        1e6,
    )


def test_the_deadline_is_twice_the_mean_prediction(planner: FleetPlanner) -> None:
    driver = driver_of(planner, {"a": after(1.0, slowdown=1e4), "b": after(1.0, slowdown=9e4)}, deadline_s=None)
    driver.run()
    plans = driver.scheduler.round_plans(["a", "b"], 0.0)
    a_s, b_s = (plan.candidate.predicted_round_s for plan in plans)
    assert b_s > 8 * a_s
    assert driver.run_round().deadline_s == pytest.approx(a_s + b_s)  # 2 x (a + b) / 2


def test_who_is_late_is_slower_than_was_thought(planner: FleetPlanner) -> None:
    driver = driver_of(planner, {"a": after(70.0)}, rounds=2, deadline_s=60.0)
    driver.run()
    assert (driver.outcomes["late"], driver.scheduler.records["a"].correction) == (2, 4.0)


def test_slow_devices_get_fewer_steps(planner: FleetPlanner) -> None:
    asked: dict[str, int] = {}

    def noting(slowdown: float) -> Callable[[Request], Reply]:
        def train(request: Request) -> Reply:
            asked[request.device] = request.payload["n_steps"]
            done = adds_one(request)
            return dataclasses.replace(done, payload={**done.payload, "slowdown": slowdown})

        return device(train)

    handlers = {"fast": noting(1e4), "usual": noting(1e4), "slow": noting(2.4e4), "snail": noting(1e6)}
    settings = {"devices_per_round": 4, "deadline_s": None, "local_steps": 10}
    driver_of(planner, handlers, rounds=2, policy=Policy("test", forecast="last", gate=False), **settings).run()
    # the median of 1, 1, 2.4 and 100 times 10 steps is 17: 17 / 2.4 = 7.1, and nobody makes less than one
    assert asked == {"fast": 10, "usual": 10, "slow": 7, "snail": 1}


class Clock:
    """A monitor whose steps take a fixed time."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.now_s = 0.0

    def available_bytes(self) -> int:
        return 1 << 40

    def elapsed_s(self) -> float:
        return self.now_s

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        self.now_s += self.step_s
        return step()

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(("limit_s", "n_steps"), [(100.0, 5), (35.0, 3), (30.0, 3), (5.0, 1)])
def test_what_is_trained_by_the_deadline_is_sent(planner: FleetPlanner, limit_s: float, n_steps: int) -> None:
    clock = Clock(10.0)
    work = LocalWork((planner.base,), 5, 0.0, (1,), True, limit_s=limit_s)
    found = 0
    for plan in local_steps(work, clock):
        clock.run_step(lambda: 0.0, plan)
        found += 1
    assert found == n_steps  # the first step begins whatever it takes


def test_asynchronous_rounds_count_whoever_answers_and_ask_again_at_once(planner: FleetPlanner) -> None:
    sent: list[tuple[float, str, float]] = []

    def noting(elapsed_s: float) -> Callable[[Request], Reply]:
        def train(request: Request) -> Reply:
            sent.append((request.now_s, request.device, float(request.arrays["w"][0])))
            return dataclasses.replace(adds_one(request), elapsed_s=elapsed_s)

        return device(train)

    handlers = {"fast": noting(10.0), "slow": noting(25.0)}
    driver = driver_of(planner, handlers, rounds=4, policy=BUFFERED)
    # two at work, and every update (half of two) is a round: fast ends at 10, 20 and 30 s, slow at 25 s
    assert [(record.clock_s, dict(record.outcomes)) for record in driver.run()] == [
        (10.0, {"fast": "ok"}),
        (20.0, {"fast": "ok"}),
        (25.0, {"slow": "ok"}),
        (30.0, {"fast": "ok"}),
    ]
    # what slow learned on the model of 0 s is added to that of 20 s
    starts = [(0.0, "fast", 0.0), (0.0, "slow", 0.0), (10.0, "fast", 1.0), (20.0, "fast", 2.0)]
    assert sent == [*starts, (25.0, "slow", 3.0)]
    assert driver.arrays["w"].tolist() == [4.0] * 3


def test_the_older_an_update_the_less_it_weighs(planner: FleetPlanner) -> None:
    def adding(step: float, elapsed_s: float) -> Callable[[Request], Reply]:
        def train(request: Request) -> Reply:
            arrays = {name: (array + step).astype(array.dtype) for name, array in request.arrays.items()}
            return dataclasses.replace(adds_one(request), arrays=arrays, elapsed_s=elapsed_s)

        return device(train)

    # three at work, two updates a round: a at 10 and 20 s, then a at 30 s together with b, which is one round old
    handlers = {"a": adding(1.0, 10.0), "b": adding(3.0, 31.0), "c": adding(0.0, 99.0)}
    driver = driver_of(planner, handlers, rounds=2, policy=BUFFERED, devices_per_round=3)
    assert [record.clock_s for record in driver.run()] == [20.0, 31.0]
    old = 1 / math.sqrt(2)
    assert driver.arrays["w"].tolist() == [pytest.approx(1 + (1 + 3 * old) / (1 + old))] * 3


def test_an_asynchronous_round_ends_where_all_fail(planner: FleetPlanner) -> None:
    def dying(request: Request) -> Reply:
        return failed(request, Outcome.OOM, 5.0, "")

    open_policy = dataclasses.replace(BUFFERED, gate=False)  # nobody rests
    handlers = {name: device(dying) for name in "abc"}
    driver = driver_of(planner, handlers, rounds=1, policy=open_policy, devices_per_round=3)
    driver.run()
    # three at work: two answers, half of them rounded up, end the round as two updates would
    assert (driver.outcomes, driver.arrays["w"].tolist()) == ({"oom": 2}, [0, 0, 0])


def test_an_asynchronous_run_goes_on_where_it_was_cut_off(planner: FleetPlanner, tmp_path: Path) -> None:
    def noisy(request: Request) -> Reply:
        random = np.random.default_rng(request.payload["seed"])
        arrays = {n: a + random.normal(size=a.shape).astype(a.dtype) for n, a in request.arrays.items()}
        return dataclasses.replace(adds_one(request), arrays=arrays, elapsed_s=float(random.uniform(1, 120)))

    def make(name: str, rounds: int) -> Driver:
        files = {"log": tmp_path / name / "log", "checkpoint": tmp_path / name / "state"}
        handlers = {name: device(noisy) for name in "abcde"}
        return driver_of(planner, handlers, rounds=rounds, policy=BUFFERED, devices_per_round=4, **files)

    make("whole", 9).run()
    make("cut", 4).run()
    resumed = make("cut", 9)
    resumed.resume()
    resumed.run()
    for name in ("log", "state"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_of_other_devices_is_refused(planner: FleetPlanner, tmp_path: Path) -> None:
    driver = driver_of(planner, {"a": device()}, rounds=1, checkpoint=tmp_path / "state")
    driver.run()
    driver.of = {"skew": 0.5}
    with pytest.raises(InvalidArgument, match="another run"):
        driver.resume()


def test_what_a_device_learned_on_an_older_model_is_carried_over() -> None:
    """Parameters by their change; a running statistic as if the device's two steps had begun at the current one."""
    base = {"w": np.array([3.0]), "variance": np.array([1.0]), "n": np.array(10), "own": np.array([1.0])}
    # in each step a variance of 0.2 is seen, at momentum 0.5: 1 -> 0.6 -> 0.4, and 0.1 -> 0.15 -> 0.175
    trained = {"w": np.array([1.0]), "variance": np.array([0.4]), "n": np.array(12), "own": np.array([2.0])}
    current = {"w": np.array([5.0]), "variance": np.array([0.1]), "n": np.array(20), "own": np.array([7.0])}
    reply = Reply("a", 1, Outcome.OK, 1.0, {"n_steps": 2}, trained)
    found = rebased(reply, base, current, {"variance": 0.5, "own": 0.0})
    assert (found["w"], found["n"], found["own"]) == (3.0, 22, 2.0)
    assert found["variance"] == pytest.approx([0.175])  # by its change it would be -0.5


def test_running_statistics_keep_what_their_momentum_leaves() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 4))
    kept = kept_by_step(model)
    assert {name for name, share in kept.items() if share} == {"0.running_mean", "0.running_var"}
    assert kept["0.running_var"] == pytest.approx(0.7)
    assert kept_by_step(nn.BatchNorm1d(4))["running_mean"] == pytest.approx(0.9)


def test_devices_are_asked_for_updates_in_8_bits(planner: FleetPlanner) -> None:
    def packing(request: Request) -> Reply:
        done = adds_one(request)
        return LocalResult(done.arrays, [], []).reply(request, done.elapsed_s, dict(done.payload))

    driver = driver_of(planner, {"a": device(packing), "b": device()}, rounds=1, update_bits=8)
    assert driver.run()[0].outcomes == {"a": "ok", "b": "invalid"}
    assert driver.arrays["w"] == pytest.approx([1, 1, 1])
    with pytest.raises(InvalidArgument, match="update_bits"):
        Settings(1, 1, update_bits=4)


def test_policies_run_asynchronously_by_name() -> None:
    assert policy_of("random-async") == dataclasses.replace(policy_of("random"), name="random-async", is_async=True)
    settings = Settings(1, devices_per_round=5)
    assert (settings.n_asked, settings.updates_wanted(policy_of("random"))) == (7, 5)
    assert settings.updates_wanted(policy_of("random-async")) == 3
    with pytest.raises(InvalidArgument, match="no policy"):
        policy_of("unheard-async")


def test_a_killed_process_teaches_the_forecaster(planner: FleetPlanner) -> None:
    def killed(request: Request) -> Reply:
        return failed(request, Outcome.KILLED, 60.0, "ClientApp stopped responding.")

    driver = driver_of(planner, {"a": device(killed), "b": device()}, rounds=1)
    told = []
    driver.scheduler.forecaster.report_miss = lambda device, t_s: told.append(device)  # type: ignore[method-assign]
    driver.run()
    assert told == ["a"]


def test_reports_are_asked_for_when_they_are_due(planner: FleetPlanner) -> None:
    kinds: list[tuple[int, Kind]] = []

    def noting(request: Request) -> Reply:
        kinds.append((request.round, request.kind))
        return device()(request)

    driver_of(planner, {"a": noting}, rounds=4, report_every=3).run()
    assert [round_index for round_index, kind in kinds if kind is Kind.REPORT] == [1, 4]


def test_rounds_are_timed_again_under_another_model_of_failure() -> None:
    ok = {"outcome": "ok", "elapsed_s": 100.0}
    died = {"outcome": "oom", "elapsed_s": 90.0, "died_s": 30.0}
    early = {**died, "died_s": 130.0, "elapsed_s": 190.0}

    def record(**replies: dict[str, object]) -> RoundRecord:
        return RoundRecord(1, 0.0, 190.0, 400.0, {}, replies, None)

    found = record(a=ok, b=died, c=early)
    assert [retimed_s(found, 2, name) for name in ("at-once", "heartbeat", "deadline")] == [130.0, 190.0, 400.0]
    assert retimed_s(found, 1, "deadline") == 190.0  # enough answered: nobody waited for the dead
