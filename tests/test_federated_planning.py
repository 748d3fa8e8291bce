"""Plans for devices that are not here."""

from __future__ import annotations

import dataclasses

import pytest

import fxhybrid
from fxhybrid.devices.device_profile import DeviceProfile, problem_on
from fxhybrid.devices.op_work import OpWork
from fxhybrid.errors import InvalidArgument, PlanMismatchError
from fxhybrid.federated.server.fleet_planner import FleetPlanner, Technique
from fxhybrid.federated.tasks.captured_step import capture_step
from fxhybrid.ir.plan import Plan
from fxhybrid.ir.simulator import simulate_actions
from fxhybrid.module import HybridModule
from tests.federated_parts import tiny_task

SLOW_COMPUTE = DeviceProfile("slow compute", flops_per_s=1e6, moved_bytes_per_s=1e9)


@pytest.fixture(scope="module")
def hybrid() -> HybridModule:
    return capture_step(tiny_task())[1]


@pytest.fixture(scope="module")
def planner(hybrid: HybridModule) -> FleetPlanner:
    return FleetPlanner.of(hybrid)


def test_every_op_has_its_work(hybrid: HybridModule) -> None:
    problem, work = hybrid.planning_problem, hybrid.planning_work
    assert len(work.forward) == len(problem.forward)
    assert len(work.backward) == len(problem.backward) - 1  # the optimizer's step, which no plan changes
    # 64 x 16 by 16 x 64, then three times 64 x 64 by 64 x 64, then 64 x 64 by 64 x 4; 2 flops for each product
    assert sum(op.flops for op in work.forward) == 2 * 64 * (16 * 64 + 3 * 64 * 64 + 64 * 4)


def test_roofline_and_table() -> None:
    # 4 MFLOP at 1 MFLOP/s take 4 s, 2 GB at 1 GB/s take 2 s: the larger counts
    profile = dataclasses.replace(SLOW_COMPUTE, launch_s=0.5, op_seconds={"known": 7.0})
    assert profile.op_s(OpWork("a", 4_000_000, 2_000_000_000)) == 4.5
    assert profile.op_s(OpWork("b", 1_000_000, 2_000_000_000)) == 2.5
    assert profile.op_s(OpWork("known", 4_000_000, 1)) == 7.0
    assert DeviceProfile.from_json(profile.to_json()) == profile


def test_profiles_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="flops_per_s"):
        DeviceProfile(flops_per_s=0.0)
    with pytest.raises(InvalidArgument, match="no device profile"):
        DeviceProfile.from_json('{"speed": 3}')


def test_plans_fit_every_budget(planner: FleetPlanner) -> None:
    low, high = planner.smallest_bytes(SLOW_COMPUTE), planner.save_all_bytes
    assert low < 0.9 * high
    problem = problem_on(planner.problem, planner.work, SLOW_COMPUTE)
    added = []
    for budget in range(high, low - 1, -(high - low) // 23):
        planned = planner.plan(SLOW_COMPUTE, budget)
        assert planned is not None
        actions = {problem.index[name]: action for name, action in planned.plan.actions.items()}
        line = simulate_actions(problem, actions)
        assert line.peak_bytes == planned.plan.peak_bytes <= planned.plan.budget_bytes <= budget
        added.append(line.overhead_s)
    assert added == sorted(added), "less memory never takes less time"
    assert planner.plan(SLOW_COMPUTE, low - 1) is None


def test_devices_of_one_kind_share_plans_whatever_their_speed(hybrid: HybridModule) -> None:
    planner = FleetPlanner.of(hybrid, n_buckets=10)
    budgets = range(planner.smallest_bytes(SLOW_COMPUTE), planner.save_all_bytes, 1009)
    profiles = [dataclasses.replace(SLOW_COMPUTE, name=f"d{i}", slowdown=1 + i) for i in range(40)]
    found = {id(planner.plan(profile, budget)) for profile in profiles for budget in budgets}
    assert len(found) <= 10
    assert len(planner._frontiers) == 1
    planned = planner.plan(SLOW_COMPUTE, planner.save_all_bytes)
    assert planned is not None
    assert planner.step_s(profiles[3], planned) == 4 * planner.step_s(SLOW_COMPUTE, planned)


def test_smaller_plans_fall_to_the_smallest(planner: FleetPlanner) -> None:
    peaks = [p.plan.peak_bytes for p in planner.smaller_plans(SLOW_COMPUTE, planner.save_all_bytes, 4)]
    assert peaks == sorted(set(peaks), reverse=True)
    assert len(peaks) >= 3
    assert peaks[-1] == planner.smallest_bytes(SLOW_COMPUTE)


def test_techniques_are_kept_to(hybrid: HybridModule) -> None:
    kinds = {}
    for technique in Technique:
        planner = FleetPlanner.of(hybrid, technique=technique)
        planned = planner.plan(SLOW_COMPUTE, planner.smallest_bytes(SLOW_COMPUTE))
        assert planned is not None
        kinds[technique] = {str(a).split("(")[0] for a in planned.plan.actions.values()} - {"save"}
    assert kinds[Technique.SAVE_ALL] == set()
    assert kinds[Technique.COMPRESS] == {"compress"}
    assert not {k for k in kinds[Technique.RECOMPUTE] if k.startswith("compress")}


def test_sent_plans_are_carried_out(hybrid: HybridModule, planner: FleetPlanner) -> None:
    planned = planner.plan(SLOW_COMPUTE, planner.smallest_bytes(SLOW_COMPUTE))
    assert planned is not None
    hybrid.use_plan(Plan.from_json(planned.text))
    assert hybrid.plan.actions == planned.plan.actions
    first = hybrid.forward_graph
    hybrid.set_budget(planner.save_all_bytes)
    assert hybrid.forward_graph is not first
    hybrid.use_plan(planned.plan)
    assert hybrid.forward_graph is first, "graphs of a plan that was carried out before are kept"


def test_a_device_with_another_graph_refuses_the_plan(planner: FleetPlanner) -> None:
    other = capture_step(tiny_task(layers=3))[1]
    planned = planner.plan(SLOW_COMPUTE, planner.save_all_bytes)
    assert planned is not None
    with pytest.raises(PlanMismatchError, match="was made for graph"):
        other.use_plan(planned.plan)


def test_a_plan_above_its_own_budget_is_refused(hybrid: HybridModule, planner: FleetPlanner) -> None:
    planned = planner.plan(SLOW_COMPUTE, planner.save_all_bytes)
    assert planned is not None
    with pytest.raises(PlanMismatchError, match="above its budget"):
        hybrid.use_plan(dataclasses.replace(planned.plan, budget_bytes=planned.plan.peak_bytes - 1))


def test_a_plan_for_another_device_counts_its_seconds_and_runs_there(hybrid: HybridModule) -> None:
    task = tiny_task()
    inputs, targets = task.example()
    budget = int(0.9 * simulate_actions(hybrid.planning_problem, {}).peak_bytes)
    asked = {"budget": budget, "loss_fn": task.loss_fn, "loss_args": (targets,)}
    twice = dataclasses.replace(SLOW_COMPUTE, slowdown=2.0)
    one, two = (
        fxhybrid.plan(task.make_model(1.0), (inputs,), device_profile=profile, **asked)
        for profile in (SLOW_COMPUTE, twice)
    )
    there = problem_on(hybrid.planning_problem, hybrid.planning_work, SLOW_COMPUTE)
    assert one.step_s == pytest.approx(there.step_s)
    assert (two.step_s, two.added_s) == pytest.approx((2 * one.step_s, 2 * one.added_s))
    assert two.actions == one.actions
    carried = fxhybrid.compile(task.make_model(1.0), example_inputs=(inputs,), plan=one, **asked)
    assert carried.plan.actions == one.actions
    assert carried.plan.peak_bytes == one.peak_bytes <= budget
