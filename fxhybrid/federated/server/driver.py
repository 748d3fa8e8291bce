"""The driver: rounds of report, forecast, plan, select, train, check and average, over any transport.

A synchronous round asks more devices than it needs, and ends when enough have answered. An asynchronous one (FedBuff,
Nguyen et al., AISTATS 2022) keeps as many at work all the time, each on the model of the moment it was asked, and ends
when half as many have answered.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.forecast import UNLIMITED_BYTES, Forecaster
from fxhybrid.federated.protocol.messages import DEATHS, Arrays, Kind, Outcome, Reply, Request, failed, n_bytes
from fxhybrid.federated.protocol.transport import Transport
from fxhybrid.federated.selection.candidates import ClientSelector, Selection
from fxhybrid.federated.server.aggregation import (
    Update,
    average,
    rebased,
    shapes_of,
    staleness_weight,
    weight_of,
    why_invalid,
)
from fxhybrid.federated.server.checkpoint import Checkpoint
from fxhybrid.federated.server.device_registry import DeviceRegistry, readings_of
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.server.round_plans import Fleet, RoundPlan, deadline_of
from fxhybrid.federated.server.run_log import RoundRecord, RunLog, log_entry
from fxhybrid.federated.tasks.tasks import Score

_log = logging.getLogger(__name__)


class Driver:
    """Runs one federated job. The only random draws are seeded by run, selection and device."""

    def __init__(
        self,
        transport: Transport,
        fleet: Fleet,
        arrays: Arrays,
        *,
        policy: Policy,
        settings: Settings,
        forecaster: Forecaster,
        selector: ClientSelector,
        evaluate: Callable[[Arrays], Score],
        of: Mapping[str, Any],
        statistics: Collection[str] = (),
        log: Path | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Joins the parts.

        Args:
            transport: reaches the devices.
            fleet: plans for them.
            arrays: the initial model.
            policy: method or baseline.
            settings: of the run.
            forecaster: of the devices' memory.
            selector: of the devices.
            evaluate: scores a model.
            of: what is trained by whom, as JSON values; a checkpoint of anything else is refused.
            statistics: names of arrays that are no parameters, see ``rebased``.
            log: JSON lines of every round go here.
            checkpoint: written after each round.
        """
        self.transport, self.fleet, self.arrays = transport, fleet, arrays
        self.policy, self.settings, self.of = policy, settings, dict(of)
        self.forecaster, self.selector = forecaster, selector
        self.evaluate = evaluate
        self.statistics = frozenset(statistics)
        self.log = RunLog(log) if log else None
        self.checkpoint = checkpoint
        self.registry = DeviceRegistry()
        self.round = self.n_selections = 0
        self.clock_s = 0.0
        self.outcomes: Counter[str] = Counter()
        self._open: dict[str, Request] = {}

    # -- running ------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None) -> list[RoundRecord]:
        """Runs all rounds that are left; returns their records."""
        total, name = self.settings.rounds, self.policy.name
        bar = progress.add_task(name, total=total, completed=self.round) if progress else None
        records = []
        while self.round < self.settings.rounds and self.clock_s < self.settings.until_s:
            records.append(self.run_round())
            _log.info("%s", records[-1])
            if progress and bar is not None:
                score = records[-1].score
                text = f"{name} {score.accuracy:.1%}" if score else name
                progress.update(bar, completed=self.round, description=text)
        return records

    def run_round(self) -> RoundRecord:
        """Runs one round to its end, whatever devices do."""
        self.round += 1
        start_s, wanted = self.clock_s, self.settings.updates_wanted(self.policy)
        refused = self._reports()
        deadline_s, selection = self._launch()
        selections, replies = [selection], []
        updates: list[Update] = []
        while len(updates) < wanted and (found := self._receive()) is not None:
            reply, request = found
            replies.append(reply)
            if reply.outcome is Outcome.OK:
                updates.append(self._update(reply, request))
            if self.policy.is_async and len(updates) < wanted:
                selections.append(self._launch()[1])
        if not replies:
            self.clock_s += deadline_s  # nobody can take part; look again later
        unused = [] if self.policy.is_async else self._drop()
        self.arrays = average(self.arrays, updates)
        outcomes = {reply.device: reply.outcome.value for reply in [*replies, *unused]}
        self.outcomes.update(reply.outcome.value for reply in [*replies, *unused])
        score = self.evaluate(self.arrays) if self._is_scored() else None
        entries = {reply.device: log_entry(reply) for reply in replies}
        elapsed_s = self.clock_s - start_s
        record = RoundRecord(self.round, self.clock_s, elapsed_s, deadline_s, outcomes, entries, score)
        self._write(record, selections, [update.device for update in updates], refused)
        return record

    def _is_scored(self) -> bool:
        return self.round % self.settings.evaluate_every == 0 or self.round == self.settings.rounds

    def _reports(self) -> list[str]:
        """Asks devices for their memory, new ones in every round; returns the reports that were refused, in words."""
        requests = []
        is_due = (self.round - 1) % self.settings.report_every == 0
        for device in self.transport.devices():
            record = self.registry.records.get(device)
            if record is None or (is_due and device not in self._open):
                payload = {"introduce": record is None, "since_s": record.last_report_s if record else 0.0}
                deadline_s = self.settings.report_deadline_s
                requests.append(Request(device, Kind.REPORT, self.round, self.clock_s, deadline_s, payload))
        refused = []
        replies = self.transport.ask(requests) if requests else []
        for reply in (r for r in replies if r.outcome is Outcome.OK):
            try:
                for t_s, available_bytes in self.registry.record_report(reply, self.clock_s):
                    self.forecaster.observe(reply.device, t_s, available_bytes)
            except InvalidArgument as error:
                refused.append(str(error))
        self.clock_s += max((r.elapsed_s for r in replies), default=0.0)
        return refused

    def _forecast(self, device: str, horizon_s: float) -> int:
        if self.policy.forecast == "none":
            return UNLIMITED_BYTES
        found = self.forecaster.predict(device, now_s=self.clock_s, horizon_s=horizon_s)
        return max(found - self.settings.overhead_bytes, 0)

    # -- requests -----------------------------------------------------------------------------------------

    def _launch(self) -> tuple[float, Selection]:
        """Selects devices for all free places and has them train; returns their deadline, too."""
        self.n_selections += 1
        idle = [device for device in self.transport.devices() if device not in self._open]
        plans = self.fleet.round_plans(self.registry, self.policy, self.settings, self._forecast, idle)
        deadline_s = deadline_of(plans, self.settings)
        usable = {plan.candidate.client: plan for plan in plans if self._can_take_part(plan, deadline_s)}
        places = self.settings.n_asked - len(self._open)
        candidates = [plan.candidate for plan in usable.values()]
        selection = self.selector.select(candidates, places, round_index=self.n_selections)
        chosen = [usable[name] for name in selection.chosen]
        durations_s = [request.payload["predicted_s"] for request in self._open.values()]
        durations_s += [plan.candidate.predicted_round_s for plan in chosen]
        requests = [self._request(plan, deadline_s, statistics.median(durations_s)) for plan in chosen]
        self._open |= {request.device: request for request in requests}
        self.transport.send(requests)
        return deadline_s, selection

    def _can_take_part(self, plan: RoundPlan, deadline_s: float) -> bool:
        """Returns whether a device can train and does not rest; without the gate anybody may."""
        is_rested = self.registry.records[plan.candidate.client].rests_until < self.round
        return not self.policy.gate or (is_rested and plan.is_usable(deadline_s))

    def _request(self, plan: RoundPlan, deadline_s: float, typical_s: float) -> Request:
        device = plan.candidate.client
        self.registry.record_selection(device, self.n_selections)
        payload = {
            **plan.work(self.policy, deadline_s, typical_s),
            "seed": [self.settings.seed, self.n_selections, *device.encode()],
        }
        arrays = self.fleet.part(self.arrays, plan.width)
        return Request(device, Kind.TRAIN, self.round, self.clock_s, deadline_s, payload, arrays)

    # -- replies ------------------------------------------------------------------------------------------

    def _receive(self) -> tuple[Reply, Request] | None:
        """Waits for the next reply, moves the clock to it and learns from it."""
        reply = self.transport.receive()
        if reply is None:
            return None
        request = self._open.pop(reply.device)
        self.clock_s = max(self.clock_s, request.now_s + reply.elapsed_s)
        if reply.outcome is Outcome.OK:
            why = why_invalid(reply, self.arrays, shapes_of(request.arrays))
            reply = dataclasses.replace(reply, outcome=Outcome.INVALID, arrays={}, detail=why) if why else reply
        self._learn(reply, request)
        return reply, request

    def _learn(self, reply: Reply, request: Request) -> None:
        if reply.outcome is not Outcome.OK:
            self.registry.record_failure(reply, self.round)
            if reply.outcome in DEATHS and self.policy.forecast != "none":
                self.forecaster.report_miss(reply.device, request.now_s + reply.elapsed_s)
            return
        self.registry.record_answer(reply, n_bytes(request.arrays))
        for t_s, available_bytes in readings_of(reply.payload):
            self.forecaster.observe(reply.device, t_s, available_bytes)

    def _update(self, reply: Reply, request: Request) -> Update:
        weight, age = weight_of(reply, self.policy.weighting), self.round - request.round
        if not age:
            return Update(reply.device, reply.arrays, weight)
        current = self.fleet.part(self.arrays, request.payload["width"])
        arrays = rebased(reply, request.arrays, current, self.statistics)
        return Update(reply.device, arrays, weight * staleness_weight(age))

    def _drop(self) -> list[Reply]:
        """Lets go of devices that still train."""
        unused = [failed(request, Outcome.UNUSED, 0.0, "") for request in self._open.values()]
        self._open.clear()
        self.transport.drop()
        return unused

    # -- what remains of a round ---------------------------------------------------------------------------

    def _write(
        self,
        record: RoundRecord,
        selections: Sequence[Selection],
        counted: Sequence[str],
        refused: Sequence[str],
    ) -> None:
        if self.log is not None:
            line = {
                "policy": self.policy.name,
                **dataclasses.asdict(record),
                "counted": list(counted),
                "refused_reports": list(refused),
                "selections": [selection.to_json() for selection in selections],
            }
            self.log.append(line)
        if self.checkpoint is not None:
            Checkpoint(self.arrays, self._state(), list(self._open.values())).save(self.checkpoint)

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "round": self.round,
            "n_selections": self.n_selections,
            "clock_s": self.clock_s,
            "outcomes": dict(self.outcomes),
            "registry": self.registry.to_json(),
            "forecaster": self.forecaster.to_state(),
            "selector": self.selector.state,
        }

    def _identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to go on; it may get longer."""
        settings = dataclasses.asdict(self.settings)
        del settings["rounds"], settings["until_s"]
        of = {"policy": self.policy.name, "settings": settings, "fingerprint": self.fleet.fingerprint}
        return {**of, "of": self.of}

    def resume(self) -> None:
        """Goes on from the checkpoint; the log's lines of rounds that it does not hold are dropped.

        Devices that were at work are asked again, for the same work on the same model.

        Raises:
            InvalidArgument: there is none, or it belongs to another run.
        """
        if self.checkpoint is None:
            raise InvalidArgument("there is no checkpoint to resume from; name its file")
        found = Checkpoint.load(self.checkpoint, self._identity())
        state = found.state
        self.arrays, self.round, self.clock_s = found.arrays, state["round"], state["clock_s"]
        self.n_selections = state["n_selections"]
        self.registry, self.outcomes = DeviceRegistry.from_json(state["registry"]), Counter(state["outcomes"])
        self.forecaster = self.forecaster.from_state(state["forecaster"])
        self.selector.state = state["selector"]
        self._open = {request.device: request for request in found.requests}
        self.transport.send(found.requests)
        if self.log is not None:
            self.log.drop_after(self.round)
