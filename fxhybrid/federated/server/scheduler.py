"""The scheduler: what the server knows of devices, who is asked for what, and what their answers teach.

It knows neither a transport nor how models are averaged, so that other drivers can use it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.forecast import UNLIMITED_BYTES, Forecaster
from fxhybrid.federated.protocol.compact_updates import BITS, unpack_update
from fxhybrid.federated.protocol.messages import DEATHS, Arrays, Kind, Outcome, Reply, Request, n_bytes
from fxhybrid.federated.selection.candidates import Selection, Selector
from fxhybrid.federated.server.aggregation import shapes_of, why_invalid
from fxhybrid.federated.server.device_records import DeviceRecord, Records, readings_of, take_report
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.server.round_plans import Fleet, RoundPlan, deadline_of


@dataclass(frozen=True)
class Launch:
    """Holds the trainings that begin at a time.

    Attributes:
        deadline_s: that they have.
        selection: who was chosen, and why.
        requests: to be sent.
    """

    deadline_s: float
    selection: Selection
    requests: tuple[Request, ...]


class Scheduler:
    """Asks devices for reports and trainings. The only random draws are seeded by run and selection."""

    def __init__(
        self, fleet: Fleet, *, policy: Policy, settings: Settings, forecaster: Forecaster, select: Selector
    ) -> None:
        """Joins the parts.

        Args:
            fleet: plans for devices.
            policy: method or baseline.
            settings: of the run.
            forecaster: of the devices' memory.
            select: chooses among the devices.
        """
        self.fleet, self.policy, self.settings = fleet, policy, settings
        self.forecaster, self.select = forecaster, select
        self.records: Records = {}
        self.n_selections = 0
        self.open: dict[str, Request] = {}  # by device: trainings without an answer

    # -- reports ------------------------------------------------------------------------------------------

    def report_requests(self, devices: Iterable[str], round_index: int, now_s: float) -> list[Request]:
        """Makes requests for reports of memory: of new devices in every round, of idle ones when they are due."""
        is_due = (round_index - 1) % self.settings.report_every == 0
        requests = []
        for device in devices:
            record = self.records.get(device)
            if record is None or (is_due and device not in self.open):
                payload = {"introduce": record is None, "since_s": record.last_report_s if record else 0.0}
                deadline_s = self.settings.report_deadline_s
                requests.append(Request(device, Kind.REPORT, round_index, now_s, deadline_s, payload))
        return requests

    def take_reports(self, replies: Iterable[Reply], now_s: float) -> list[str]:
        """Notes reports; returns those that were refused, in words."""
        refused = []
        for reply in (r for r in replies if r.outcome is Outcome.OK):
            try:
                for t_s, available_bytes in take_report(self.records, reply, now_s):
                    self.forecaster.observe(reply.device, t_s, available_bytes)
            except InvalidArgument as error:
                refused.append(str(error))
        return refused

    # -- trainings ----------------------------------------------------------------------------------------

    def launch(self, devices: Iterable[str], arrays: Arrays, round_index: int, now_s: float) -> Launch:
        """Selects devices for all free places, and makes their requests."""
        self.n_selections += 1
        plans = self.round_plans([device for device in devices if device not in self.open], now_s)
        deadline_s = deadline_of(plans, self.settings)
        usable = {plan.candidate.client: plan for plan in plans if self._can_take_part(plan, round_index, deadline_s)}
        places = self.settings.n_asked - len(self.open)
        candidates = [plan.candidate for plan in usable.values()]
        selection = self.select(candidates, places, round_index=self.n_selections, seed=self.settings.seed)
        chosen = [usable[name] for name in selection.chosen]
        durations_s = [request.payload["predicted_s"] for request in self.open.values()]
        durations_s += [plan.candidate.predicted_round_s for plan in chosen]
        requests = []
        for plan in chosen:
            device = plan.candidate.client
            self.records[device].note_selection(self.n_selections)
            work = plan.work(self.policy, deadline_s, statistics.median(durations_s))
            work["update_bits"] = self.settings.update_bits
            work["seed"] = [self.settings.seed, self.n_selections, *device.encode()]
            part = self.fleet.part(arrays, plan.width)
            requests.append(Request(device, Kind.TRAIN, round_index, now_s, deadline_s, work, part))
        self.open |= {request.device: request for request in requests}
        return Launch(deadline_s, selection, tuple(requests))

    def round_plans(self, devices: Sequence[str], now_s: float) -> list[RoundPlan]:
        """Plans what each device could train now."""

        def forecast(device: str, horizon_s: float) -> int:
            if self.policy.forecast == "none":
                return UNLIMITED_BYTES
            found = self.forecaster.predict(device, now_s=now_s, horizon_s=horizon_s)
            return max(found - self.settings.overhead_bytes, 0)

        return self.fleet.round_plans(self.records, self.policy, self.settings, forecast, devices)

    def _can_take_part(self, plan: RoundPlan, round_index: int, deadline_s: float) -> bool:
        """Returns whether a device can train and does not rest; without the gate anybody may."""
        is_rested = self.records[plan.candidate.client].rests_until < round_index
        return not self.policy.gate or (is_rested and plan.is_usable(deadline_s))

    def take_reply(self, reply: Reply, model: Arrays, round_index: int) -> tuple[Reply, Request]:
        """Checks the reply to an open training and learns from it; returns it, INVALID if it cannot be used.

        Args:
            reply: of a device that was asked.
            model: names and types that a trained model must have.
            round_index: the round now.
        """
        request = self.open.pop(reply.device)
        if reply.outcome is Outcome.OK:
            reply = _checked(reply, request, model)
        if reply.outcome is Outcome.OK:
            self.records[reply.device].note_answer(reply, n_bytes(request.arrays))
            for t_s, available_bytes in readings_of(reply.payload):
                self.forecaster.observe(reply.device, t_s, available_bytes)
        else:
            self.records[reply.device].note_failure(reply, round_index)
            if reply.outcome in DEATHS and self.policy.forecast != "none":
                self.forecaster.report_miss(reply.device, request.now_s + reply.elapsed_s)
        return reply, request

    # -- checkpoints --------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Returns everything but open trainings as JSON values."""
        return {
            "n_selections": self.n_selections,
            "records": {device: dataclasses.asdict(record) for device, record in self.records.items()},
            "forecaster": self.forecaster.to_state(),
        }

    def restore(self, state: dict[str, Any], requests: Iterable[Request]) -> None:
        """Goes on from ``to_state``, with the trainings that were open then."""
        self.n_selections = state["n_selections"]
        self.records = {device: DeviceRecord(**record) for device, record in state["records"].items()}
        self.forecaster = self.forecaster.from_state(state["forecaster"])
        self.open = {request.device: request for request in requests}


def _checked(reply: Reply, request: Request, model: Arrays) -> Reply:
    """Returns an answer with its arrays unpacked, or that it is INVALID."""
    why = ""
    if request.payload["update_bits"] == BITS:
        try:
            reply = dataclasses.replace(reply, arrays=unpack_update(reply.arrays, request.arrays))
        except InvalidArgument as error:
            why = str(error)
    why = why or why_invalid(reply, model, shapes_of(request.arrays))
    return dataclasses.replace(reply, outcome=Outcome.INVALID, arrays={}, detail=why) if why else reply
