"""Round plans: what each device could train in a round, by which plan, in how much time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.protocol.messages import Arrays, n_bytes
from fxhybrid.federated.protocol.model_arrays import leading_slice
from fxhybrid.federated.selection.candidates import Candidate
from fxhybrid.federated.server.device_registry import DeviceRecord, DeviceRegistry
from fxhybrid.federated.server.fleet_planner import DevicePlan, FleetPlanner
from fxhybrid.federated.server.policies import Policy, Settings

N_SMALLER = 3  # plans that an elastic client gets in addition to the first
SLACK = 1.5  # a round may take so much longer than predicted for the unmodified step: what memory is forecast over


@dataclass(frozen=True)
class RoundPlan:
    """Plans what one device could do in a round.

    Attributes:
        candidate: as selectors see it.
        plans: the plan for it, then smaller ones.
        width: of the model that it would train.
    """

    candidate: Candidate
    plans: tuple[DevicePlan, ...]
    width: float


class Fleet:
    """Plans for all devices, by the widths that a policy knows."""

    def __init__(self, planners: Mapping[float, FleetPlanner], parts: Mapping[float, Arrays]) -> None:
        """Keeps one planner and one example of the model's arrays for each width, the widest first."""
        self.planners = dict(sorted(planners.items(), reverse=True))
        self.parts = dict(parts)
        self.model_bytes = {width: n_bytes(part) for width, part in self.parts.items()}

    @property
    def fingerprint(self) -> str:
        """Returns that of the full model's graph."""
        return self.planners[max(self.planners)].base.graph_fingerprint

    def part(self, arrays: Arrays, width: float) -> Arrays:
        """Takes the global model's part for a width."""
        return arrays if width == max(self.planners) else leading_slice(arrays, self.parts[width])

    def round_plans(
        self,
        registry: DeviceRegistry,
        policy: Policy,
        settings: Settings,
        forecast: Callable[[str, float], int],
        devices: Iterable[str],
    ) -> list[RoundPlan]:
        """Plans the round for each device that is there and has reported."""
        known = [(device, registry.records[device]) for device in devices if device in registry.records]
        return [self._round_plan(device, record, policy, settings, forecast) for device, record in known]

    def _round_plan(
        self,
        device: str,
        record: DeviceRecord,
        policy: Policy,
        settings: Settings,
        forecast: Callable[[str, float], int],
    ) -> RoundPlan:
        profile = record.device_profile
        widest = next(iter(self.planners.values()))
        full_s = settings.local_steps * widest.unmodified_s(profile)
        horizon_s = SLACK * full_s + 2 * self.model_bytes[max(self.planners)] / record.bytes_per_s
        available_bytes = forecast(device, min(horizon_s, settings.deadline_s))
        width, planned = self._choice(record, available_bytes)
        if planned is None and policy.elastic:
            # it can wait between steps: what counts is whether one step gets through
            available_bytes = forecast(device, SLACK * widest.unmodified_s(profile))
            width, planned = self._choice(record, available_bytes)
        planner = self.planners[width]
        if planned is None and not policy.gate:
            planned = planner.plan(profile, planner.smallest_bytes(profile))
        step_s = planner.step_s(profile, planned) if planned else math.inf
        transfer_s = 2 * self.model_bytes[width] / record.bytes_per_s
        candidate = Candidate(
            client=device,
            n_examples=record.n_examples,
            mean_squared_loss=record.squared_loss,
            available_bytes=available_bytes,
            smallest_plan_bytes=min(p.smallest_bytes(profile) for p in self.planners.values()),
            full_bytes=widest.save_all_bytes,
            predicted_step_s=step_s,
            predicted_round_s=settings.local_steps * step_s + transfer_s,
            last_seen_round=record.last_seen_round,
            times_selected=record.times_selected,
        )
        return RoundPlan(candidate, _with_smaller(planner, profile, planned, policy), width)

    def _choice(self, record: DeviceRecord, available_bytes: int) -> tuple[float, DevicePlan | None]:
        """Finds the widest model for which there is a plan; without any, the narrowest model and None."""
        for width, planner in self.planners.items():
            planned = planner.plan(record.device_profile, available_bytes)
            if planned is not None:
                return width, planned
        return min(self.planners), None


def _with_smaller(
    planner: FleetPlanner, profile: DeviceProfile, planned: DevicePlan | None, policy: Policy
) -> tuple[DevicePlan, ...]:
    """Adds the smaller plans that an elastic device may change to."""
    if planned is None:
        return ()
    if not policy.elastic:
        return (planned,)
    lower = planner.smaller_plans(profile, planned.plan.budget_bytes, N_SMALLER)
    return (planned, *(p for p in lower if p.plan.peak_bytes < planned.plan.peak_bytes))
