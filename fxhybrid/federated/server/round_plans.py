"""Round plans: what each device could train in a round, by which plan, in how much time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.protocol.messages import Arrays, n_bytes
from fxhybrid.federated.protocol.model_arrays import leading_slice
from fxhybrid.federated.selection.candidates import Candidate
from fxhybrid.federated.server.device_records import DeviceRecord, Records
from fxhybrid.federated.server.fleet_planner import DevicePlan, FleetPlanner
from fxhybrid.federated.server.policies import DEADLINE, Policy, Settings

N_SMALLER = 3  # plans that an elastic client gets in addition to the first
PATIENCE = 0.5  # share of a round's deadline that a device may wait for memory
ON_TIME = 0.9  # share of a round's deadline after which a device sends what it has
SLACK = 1.5  # a round may take so much longer than predicted for the unmodified step: what memory is forecast over


@dataclass(frozen=True)
class RoundPlan:
    """Plans what one device could do in a round.

    Attributes:
        candidate: as selectors see it.
        plans: the plan for it, then smaller ones.
        width: of the model that it would train.
        most_steps: local steps of a device that is no slower than others.
    """

    candidate: Candidate
    plans: tuple[DevicePlan, ...]
    width: float
    most_steps: int

    @property
    def transfer_s(self) -> float:
        """Returns the seconds that the model travels, both ways."""
        return self.candidate.predicted_round_s - self.most_steps * self.candidate.predicted_step_s

    def is_usable(self, deadline_s: float) -> bool:
        """Returns whether a plan fits the device, and one step by it can be in time."""
        one_step_s = self.transfer_s + self.candidate.predicted_step_s
        return self.candidate.fits and bool(self.plans) and one_step_s <= deadline_s

    def n_steps(self, typical_s: float) -> int:
        """Computes how many local steps the device makes in the time that is typical of a round.

        FedProx (Li et al., MLSys 2020) has slow devices do a part of the work, too, instead of leaving them out.
        """
        n_steps = (typical_s - self.transfer_s) / self.candidate.predicted_step_s
        return min(max(int(n_steps + 1e-9), 1), self.most_steps)

    def work(self, policy: Policy, deadline_s: float, typical_s: float) -> dict[str, Any]:
        """Describes what the device shall train, see ``LocalWork``; ``seed`` is missing."""
        return {
            "plans": [planned.text for planned in self.plans],
            "n_steps": self.n_steps(typical_s),
            "mu": policy.mu,
            "elastic": policy.elastic,
            "patience_s": PATIENCE * deadline_s,
            "width": self.width,
            "limit_s": ON_TIME * deadline_s - self.transfer_s,
            "predicted_s": self.candidate.predicted_round_s,
        }


def deadline_of(plans: Iterable[RoundPlan], settings: Settings) -> float:
    """Returns the seconds that the devices of a round have, see ``Settings.deadline_s``."""
    if settings.deadline_s is not None:
        return settings.deadline_s
    durations_s = [plan.candidate.predicted_round_s for plan in plans]
    finite = [seconds for seconds in durations_s if math.isfinite(seconds)]
    # before a device has answered, its prediction is what its profile promises, and may be far too short
    return max(DEADLINE * statistics.fmean(finite or [0.0]), settings.report_deadline_s)


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
        records: Records,
        policy: Policy,
        settings: Settings,
        forecast: Callable[[str, float], int],
        devices: Iterable[str],
    ) -> list[RoundPlan]:
        """Plans the round for each device that is there and has reported."""
        known = [device for device in devices if device in records]
        return [self._round_plan(device, records[device], policy, settings, forecast) for device in known]

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
        unmodified_s = record.correction * widest.unmodified_s(profile)
        horizon_s = (
            SLACK * settings.local_steps * unmodified_s + 2 * self.model_bytes[max(self.planners)] / record.bytes_per_s
        )
        available_bytes = forecast(device, min(horizon_s, settings.deadline_s or math.inf))
        width, planned = self._choice(record, available_bytes)
        if planned is None and policy.elastic:
            # it can wait between steps: what counts is whether one step gets through
            available_bytes = forecast(device, SLACK * unmodified_s)
            width, planned = self._choice(record, available_bytes)
        planner = self.planners[width]
        if planned is None and not policy.gate:
            planned = planner.plan(profile, planner.smallest_bytes(profile))
        step_s = record.correction * planner.step_s(profile, planned) if planned else math.inf
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
        return RoundPlan(candidate, _with_smaller(planner, profile, planned, policy), width, settings.local_steps)

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
