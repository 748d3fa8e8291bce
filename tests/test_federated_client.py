"""Local training: inside its plan, moving down where memory falls, and a typed error where it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.client.local_steps import LocalWork
from fxhybrid.federated.client.trainer import Trainer
from fxhybrid.federated.protocol.messages import Kind, Outcome, Request
from fxhybrid.federated.protocol.model_arrays import to_arrays
from fxhybrid.federated.protocol.transport import InProcessTransport
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.simulation.devices import SWAP_SHARE, SimulatedDevice, SimulatedMemory
from fxhybrid.ir.plan import Plan
from fxhybrid.profiling.allocator import measure_step
from tests.federated_parts import PLENTY, tiny_task

TASK = tiny_task()
DATA = TASK.clients["client0"]
PROFILE = DeviceProfile(flops_per_s=1e6, moved_bytes_per_s=1e6)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(TASK)


@pytest.fixture(scope="module")
def plans(trainer: Trainer) -> tuple[Plan, ...]:
    planner = FleetPlanner.of(trainer.hybrid)
    found = [planner.plan(PROFILE, planner.save_all_bytes)]
    found += planner.smaller_plans(PROFILE, planner.save_all_bytes, 4)
    kept = [planned.plan for planned in found if planned is not None]
    return tuple(plan for i, plan in enumerate(kept) if i == 0 or plan.peak_bytes < kept[i - 1].peak_bytes)


class Readings:
    """A monitor with one reading for each look at memory; notes the plans that ran and the time that passed."""

    def __init__(self, readings: list[int]) -> None:
        self.readings = iter(readings)
        self.ran: list[int] = []
        self.waited_s = 0.0

    def elapsed_s(self) -> float:
        return self.waited_s

    def available_bytes(self) -> int:
        return next(self.readings)

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        self.ran.append(plan.peak_bytes)
        return step()

    def wait(self, seconds: float) -> None:
        self.waited_s += seconds


def work(
    plans: tuple[Plan, ...], *, n_steps: int = 3, mu: float = 0.0, elastic: bool = True, patience_s: float = 0.0
) -> LocalWork:
    return LocalWork(plans, n_steps, mu, (1, 2), elastic, patience_s)


def test_training_lowers_the_loss_and_repeats_itself(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    start = to_arrays(TASK.make_model(1.0))
    first, second = (trainer.train(start, work(plans, n_steps=40), DATA, Readings([PLENTY] * 40)) for _ in range(2))
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in start)
    later = trainer.train(first.arrays, work(plans), DATA, Readings([PLENTY] * 3))
    assert mean(later.losses) < 0.5 * mean(first.losses)


def test_measured_peaks_stay_within_the_plans(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    inputs, targets = next(DATA.batches(TASK.batch_size, (0,)))
    assert len(plans) >= 3
    for plan in plans:
        trainer.hybrid.use_plan(plan)

        def step(x: torch.Tensor = inputs, y: torch.Tensor = targets) -> None:
            trainer._gradients(x, y)

        measured = measure_step(step, modules=trainer.model, tensors=(inputs, targets), repeats=0)
        assert measured.peak_bytes <= plan.peak_bytes


def test_the_client_moves_down_as_memory_falls_and_up_again(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    high, low = plans[0].peak_bytes, plans[-1].peak_bytes
    # a tenth of what is free stays so, but for the smallest plan: low fits low, and high takes high / 0.9
    monitor = Readings([int(high / 0.9) + 1, low, low + 1, high, PLENTY])
    result = trainer.train(to_arrays(TASK.make_model(1.0)), work(plans, n_steps=5), DATA, monitor)
    assert monitor.ran[0] == monitor.ran[-1] == high
    assert monitor.ran[1] == monitor.ran[2] == low
    assert low < monitor.ran[3] < high
    measured = result.measured(1, steps_s=1.0, busy_s=1.0, readings=[])
    assert (measured["n_moves"], measured["peak_bytes"], measured["n_steps"]) == (3, high, 5)


def test_the_client_waits_for_memory_and_sends_what_it_has(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    low, start = plans[-1].peak_bytes, to_arrays(TASK.make_model(1.0))
    monitor = Readings([low, 0, 0, low, low])
    assert trainer.train(start, work(plans, patience_s=10.0), DATA, monitor).plans == [plans[-1]] * 3
    assert (monitor.ran, monitor.waited_s) == ([low] * 3, 10.0)
    # 10 s of patience are two looks more; then one of the three steps is what there is
    cut = trainer.train(start, work(plans, patience_s=10.0), DATA, Readings([low, 0, 0, 0]))
    assert len(cut.plans) == 1
    one = trainer.train(start, work(plans, n_steps=1), DATA, Readings([low]))
    assert all(np.array_equal(cut.arrays[name], one.arrays[name]) for name in start)


def test_no_plan_small_enough_is_a_memory_error(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    with pytest.raises(MemoryError, match="smallest plan"):
        trainer.train(to_arrays(TASK.make_model(1.0)), work(plans), DATA, Readings([plans[-1].peak_bytes - 1]))


def test_the_proximal_term_pulls_to_the_start(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    start = to_arrays(TASK.make_model(1.0))

    def distance(mu: float) -> float:
        result = trainer.train(start, work(plans, n_steps=10, mu=mu), DATA, Readings([PLENTY] * 10))
        return float(sum(((result.arrays[name] - start[name]) ** 2).sum() for name in start))

    assert distance(3.0) < 0.5 * distance(0.0)


def payload_of(plans: tuple[Plan, ...], **others: object) -> dict[str, object]:
    texts = [plan.to_json() for plan in plans]
    payload = {"plans": texts, "n_steps": 1, "mu": 0.0, "seed": [1], "elastic": False, "patience_s": 0.0, "width": 1.0}
    payload |= {"limit_s": 1e9}
    return {**payload, **others}


@pytest.mark.parametrize(
    "change", [{"n_steps": 0}, {"plans": []}, {"mu": float("nan")}, {"n_steps": "3"}, {"patience_s": -1.0}]
)
def test_impossible_work_is_refused(plans: tuple[Plan, ...], change: dict[str, object]) -> None:
    payload = payload_of(plans[:1])
    assert LocalWork.from_payload(payload).plans[0] == plans[0]
    with pytest.raises(InvalidArgument, match="cannot"):
        LocalWork.from_payload({**payload, **change})


def simulated(
    trainer: Trainer,
    plans: tuple[Plan, ...],
    levels: list[int],
    *,
    elastic: bool,
    patience_s: float = 0.0,
    failures: str = "at-once",
    swaps: bool = False,
    limit_s: float = 1e9,
) -> tuple[str, float]:
    """One training of 4 steps on a device whose memory has these levels, one per 1,000 s; outcome and seconds."""
    step_s = plans[0].step_s + plans[0].added_s
    profile = DeviceProfile(slowdown=1000.0 / step_s)  # one step of the largest plan takes 1,000 s
    memory = SimulatedMemory(1000.0, np.array(levels))
    device = SimulatedDevice("d", profile, memory, 1e12, 1e12, 0.0, DATA, failures, swaps=swaps)
    payload = payload_of(plans, n_steps=4, elastic=elastic, patience_s=patience_s, limit_s=limit_s)
    request = Request("d", Kind.TRAIN, 1, 0.0, 1e6, payload, to_arrays(TASK.make_model(1.0)))
    transport = InProcessTransport({"d": device.handler({1.0: trainer})})
    transport.send([request])
    reply = transport.receive()
    assert reply is not None
    return reply.outcome.value, reply.elapsed_s


def test_a_simulated_device_dies_where_memory_falls_under_the_plan(trainer: Trainer, plans: tuple[Plan, ...]) -> None:
    high, low = plans[0].peak_bytes, plans[-1].peak_bytes
    assert simulated(trainer, plans, [high] * 9, elastic=False)[0] == "ok"
    # the second step, from 1,000 s on, meets too little at its end
    outcome, elapsed_s = simulated(trainer, plans, [high, high, *[low] * 5], elastic=False)
    assert outcome == Outcome.OOM.value
    assert elapsed_s == pytest.approx(2000.0, rel=0.01)
    # too little from the start: it dies at its peak, half-way; then 60 s pass, or all time that it had
    for failures, noticed_s in (("at-once", 500.0), ("heartbeat", 560.0), ("deadline", 1e6)):
        found = simulated(trainer, plans, [low] * 9, elastic=False, failures=failures)
        assert found == (Outcome.OOM.value, pytest.approx(noticed_s, rel=0.01))
    assert simulated(trainer, plans, [0] * 9, elastic=True)[0] == Outcome.OOM.value
    # nothing is free before 3,000 s; then come four steps of at least 1,000 s each
    outcome, elapsed_s = simulated(trainer, plans, [0] * 3 + [low] * 9, elastic=True, patience_s=4000.0)
    assert (outcome, elapsed_s >= 7000.0) == ("ok", True)
    assert simulated(trainer, plans, [low] * 9, elastic=True)[0] == "ok"


def test_a_simulated_device_may_swap_and_sends_what_it_has_at_the_deadline(
    trainer: Trainer, plans: tuple[Plan, ...]
) -> None:
    high, low = plans[0].peak_bytes, plans[-1].peak_bytes
    outcome, elapsed_s = simulated(trainer, plans, [low] * 9, elastic=False, swaps=True)
    profile = DeviceProfile(slowdown=1000.0 / (plans[0].step_s + plans[0].added_s))
    # each of 4 steps takes its 1,000 s, and what does not fit goes out and in at the device's share for swapping
    swap_s = profile.slowdown * 2 * (high - low) / (SWAP_SHARE * profile.moved_bytes_per_s)
    assert (outcome, elapsed_s) == ("ok", pytest.approx(4 * (1000.0 + swap_s), rel=0.01))
    # a third step would end after 3,000 s
    outcome, elapsed_s = simulated(trainer, plans, [high] * 9, elastic=False, limit_s=2900.0)
    assert (outcome, elapsed_s) == ("ok", pytest.approx(2000.0, rel=0.01))


def test_simulated_memory_repeats_itself() -> None:
    memory = SimulatedMemory(10.0, np.array([5, 3, 8]))
    assert [memory.at(t) for t in (0.0, 9.9, 10.0, 29.0, 30.0)] == [5, 5, 3, 8, 5]
    assert memory.between(0.0, 5.0).tolist() == [5]
    assert memory.between(5.0, 12.0).tolist() == [5, 3]
    assert memory.between(20.0, 35.0).tolist() == [8, 5]
    assert memory.between(0.0, 1e9).tolist() == [5, 3, 8]


LIMITED = """
import torch
torch.set_num_threads(1)
from fxhybrid.profiling.system_memory import data_limit
from fxhybrid.federated.protocol.transport import is_out_of_memory
kept = torch.zeros(1)  # the allocator and its threads are there before the limit
with data_limit(64 << 20):
    torch.zeros(32 << 20, dtype=torch.uint8)
    try:
        torch.zeros(256 << 20, dtype=torch.uint8)
    except Exception as error:
        print("typed", is_out_of_memory(error))
torch.zeros(256 << 20, dtype=torch.uint8)
print("free again")
"""


def test_the_hard_guard_turns_a_kill_into_an_error() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["typed True", "free again"]


PLANNED = """
import dataclasses
import torch
torch.set_num_threads(1)
from fxhybrid.federated.client.trainer import LocalWork, Trainer
from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.client.node import ProcessMemoryMonitor
from fxhybrid.federated.server.fleet_planner import FleetPlanner
from fxhybrid.federated.protocol.transport import is_out_of_memory
from fxhybrid.federated.protocol.model_arrays import to_arrays
from fxhybrid.federated.protocol.transport import InProcessTransport
from tests.federated_parts import tiny_task
task = dataclasses.replace(tiny_task(), batch_size=32768)
trainer = Trainer(task)
planner, profile = FleetPlanner.of(trainer.hybrid), DeviceProfile()
small = planner.plan(profile, planner.smallest_bytes(profile)).plan
full = planner.plan(profile, planner.save_all_bytes).plan
slack_bytes = (full.peak_bytes - small.peak_bytes) // 2
class Believes(ProcessMemoryMonitor):  # holds every step to the small plan, whatever it is
    def run_step(self, step, plan):
        return super().run_step(step, small)
monitor = Believes(None, is_guarded=True, slack_bytes=slack_bytes)
for name, plan in (("small", small), ("unmodified", full)):
    work = LocalWork((plan,), 3, 0.0, (1,), False)
    try:
        trainer.train(to_arrays(task.make_model(1.0)), work, task.clients["client0"], monitor)
        print(name, "trained")
    except Exception as error:
        print(name, "out of memory" if is_out_of_memory(error) else error)
"""


def test_under_a_real_limit_the_planned_step_trains_and_the_unmodified_one_cannot() -> None:
    # the limit lies half-way between the two plans' peaks, tens of MiB from each
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", PLANNED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["small trained", "unmodified out of memory"], done.stderr
