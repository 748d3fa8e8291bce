"""The driver: rounds of report, forecast, plan, select, train, check and average, over any transport."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.forecast import UNLIMITED_BYTES, Forecaster
from fxhybrid.federated.protocol.messages import Arrays, Kind, Outcome, Reply, Request
from fxhybrid.federated.protocol.transport import Transport
from fxhybrid.federated.selection.candidates import ClientSelector, Selection
from fxhybrid.federated.server.aggregation import Update, average, shapes_of, weight_of, why_invalid
from fxhybrid.federated.server.checkpoint import Checkpoint
from fxhybrid.federated.server.device_registry import DeviceRegistry
from fxhybrid.federated.server.policies import Policy, Settings
from fxhybrid.federated.server.round_plans import Fleet, RoundPlan
from fxhybrid.federated.server.run_log import RunLog, log_entry
from fxhybrid.federated.tasks.tasks import Score

PATIENCE = 0.5  # share of a round's deadline that a device may wait for memory


@dataclass(frozen=True)
class RoundRecord:
    """Records one finished round.

    Attributes:
        round: from 1.
        clock_s: after the round.
        outcomes: by chosen device.
        score: of the global model on held-out data, where it was taken.
    """

    round: int
    clock_s: float
    outcomes: Mapping[str, str]
    score: Score | None


class Driver:
    """Runs one federated job. The only random draws are seeded by run, round and device."""

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
            log: JSON lines of every round go here.
            checkpoint: written after each round.
        """
        self.transport, self.fleet, self.arrays = transport, fleet, arrays
        self.policy, self.settings = policy, settings
        self.forecaster, self.selector = forecaster, selector
        self.evaluate = evaluate
        self.log = RunLog(log) if log else None
        self.checkpoint = checkpoint
        self.registry = DeviceRegistry()
        self.round = 0
        self.clock_s = 0.0
        self.outcomes: Counter[str] = Counter()

    # -- running ------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None) -> list[RoundRecord]:
        """Runs all rounds that are left; returns their records."""
        total, name = self.settings.rounds, self.policy.name
        bar = progress.add_task(name, total=total, completed=self.round) if progress else None
        records = []
        while self.round < self.settings.rounds:
            records.append(self.run_round())
            if progress and bar is not None:
                score = records[-1].score
                text = f"{name} {score.accuracy:.1%}" if score else name
                progress.update(bar, completed=self.round, description=text)
        return records

    def run_round(self) -> RoundRecord:
        """Runs one round to its end, whatever devices do."""
        self.round += 1
        refused = self._reports()
        devices = self.transport.devices()
        plans = self.fleet.round_plans(self.registry, self.policy, self.settings, self._forecast, devices)
        usable = {plan.candidate.client: plan for plan in plans if self._can_take_part(plan)}
        selection = self._select(list(usable.values()))
        replies = self._train([usable[name] for name in selection.chosen])
        counted = self._counted(replies)
        elapsed_s = self._elapsed_s(replies, counted)
        self._learn(replies)
        self.arrays = average(
            self.arrays, [Update(r.device, r.arrays, weight_of(r, self.policy.weighting)) for r in counted]
        )
        self.clock_s += elapsed_s
        self.outcomes.update(r.outcome.value for r in replies)
        score = self.evaluate(self.arrays) if self._is_scored() else None
        record = RoundRecord(self.round, self.clock_s, {r.device: r.outcome.value for r in replies}, score)
        self._write(record, selection, replies, counted, refused)
        return record

    def _can_take_part(self, plan: RoundPlan) -> bool:
        """Returns whether a plan fits the device and its answer can be in time; without the gate always."""
        candidate = plan.candidate
        in_time = candidate.predicted_round_s <= self.settings.deadline_s
        return (candidate.fits and in_time and bool(plan.plans)) or not self.policy.gate

    def _is_scored(self) -> bool:
        return self.round % self.settings.evaluate_every == 0 or self.round == self.settings.rounds

    def _reports(self) -> list[str]:
        """Asks every device for its memory; returns the reports that were refused, in words."""
        requests = []
        for device in self.transport.devices():
            record = self.registry.records.get(device)
            payload = {"introduce": record is None, "since_s": record.last_report_s if record else 0.0}
            deadline_s = self.settings.report_deadline_s
            requests.append(Request(device, Kind.REPORT, self.round, self.clock_s, deadline_s, payload))
        refused = []
        replies = self.transport.ask(requests, self.settings.report_deadline_s)
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

    def _select(self, usable: Sequence[RoundPlan]) -> Selection:
        count = self.settings.devices_per_round + self.settings.extra_devices
        return self.selector.select([plan.candidate for plan in usable], count, round_index=self.round)

    def _train(self, plans: Sequence[RoundPlan]) -> list[Reply]:
        requests = []
        for plan in plans:
            device = plan.candidate.client
            self.registry.record_selection(device, self.round)
            payload = {
                "plans": [planned.text for planned in plan.plans],
                "n_steps": self.settings.local_steps,
                "mu": self.policy.mu,
                "seed": [self.settings.seed, self.round, *device.encode()],
                "elastic": self.policy.elastic,
                "patience_s": PATIENCE * self.settings.deadline_s,
                "width": plan.width,
            }
            arrays = self.fleet.part(self.arrays, plan.width)
            deadline_s = self.settings.deadline_s
            requests.append(Request(device, Kind.TRAIN, self.round, self.clock_s, deadline_s, payload, arrays))
        replies = self.transport.ask(requests, self.settings.deadline_s) if requests else []
        return [self._checked(reply, request) for reply, request in zip(replies, requests, strict=True)]

    def _checked(self, reply: Reply, request: Request) -> Reply:
        if reply.outcome is not Outcome.OK:
            return reply
        why = why_invalid(reply, self.arrays, shapes_of(request.arrays))
        return dataclasses.replace(reply, outcome=Outcome.INVALID, arrays={}, detail=why) if why else reply

    def _counted(self, replies: Sequence[Reply]) -> list[Reply]:
        """Selects the usable replies that came first."""
        usable = sorted((r for r in replies if r.outcome is Outcome.OK), key=lambda r: (r.elapsed_s, r.device))
        return usable[: self.settings.devices_per_round]

    def _elapsed_s(self, replies: Sequence[Reply], counted: Sequence[Reply]) -> float:
        """Computes the round's length: until enough have answered, else until nothing more is to come."""
        if not replies:
            return self.settings.deadline_s  # nobody can take part; look again later
        waited = counted if len(counted) == self.settings.devices_per_round else replies
        return max(r.elapsed_s for r in waited)

    def _learn(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if reply.outcome is Outcome.OK:
                self.registry.records[reply.device].squared_loss = float(reply.payload["squared_loss"])
            elif reply.outcome is Outcome.OOM and self.policy.forecast != "none":
                self.forecaster.report_miss(reply.device, self.clock_s + reply.elapsed_s)

    # -- what remains of a round ---------------------------------------------------------------------------

    def _write(
        self,
        record: RoundRecord,
        selection: Selection,
        replies: Sequence[Reply],
        counted: Sequence[Reply],
        refused: Sequence[str],
    ) -> None:
        if self.log is not None:
            line = {
                "policy": self.policy.name,
                **dataclasses.asdict(record),
                "counted": [r.device for r in counted],
                "replies": {r.device: log_entry(r) for r in replies},
                "refused_reports": list(refused),
                "selection": selection.to_json(),
            }
            self.log.append(line)
        if self.checkpoint is not None:
            Checkpoint(self.arrays, self._state()).save(self.checkpoint)

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "round": self.round,
            "clock_s": self.clock_s,
            "outcomes": dict(self.outcomes),
            "registry": self.registry.to_json(),
            "forecaster": self.forecaster.to_state(),
            "selector": self.selector.state,
        }

    def _identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to go on; it may get more rounds."""
        settings = dataclasses.asdict(self.settings)
        del settings["rounds"]
        return {"policy": self.policy.name, "settings": settings, "fingerprint": self.fleet.fingerprint}

    def resume(self) -> None:
        """Goes on from the checkpoint; the log's lines of rounds that it does not hold are dropped.

        Raises:
            InvalidArgument: there is none, or it belongs to another run.
        """
        if self.checkpoint is None:
            raise InvalidArgument("there is no checkpoint to resume from; name its file")
        found = Checkpoint.load(self.checkpoint, self._identity())
        state = found.state
        self.arrays, self.round, self.clock_s = found.arrays, state["round"], state["clock_s"]
        self.registry, self.outcomes = DeviceRegistry.from_json(state["registry"]), Counter(state["outcomes"])
        self.forecaster = self.forecaster.from_state(state["forecaster"])
        self.selector.state = state["selector"]
        if self.log is not None:
            self.log.drop_after(self.round)
