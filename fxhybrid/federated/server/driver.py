"""The driver: rounds of report, forecast, plan, select, train, check and average, over any transport.

A synchronous round asks more devices than it needs, and ends when there are enough updates or all have answered. An
asynchronous one (FedBuff, Nguyen et al., AISTATS 2022) keeps as many at work all the time, each on the model of the
moment it was asked, and ends with half as many updates, or half as many answers as devices were at work.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Arrays, Outcome, Reply, Request, failed
from fxhybrid.federated.protocol.transport import Transport
from fxhybrid.federated.selection.candidates import Selection
from fxhybrid.federated.server.aggregation import Update, average, rebased, staleness_weight, weight_of
from fxhybrid.federated.server.checkpoint import Checkpoint
from fxhybrid.federated.server.run_log import RoundRecord, RunLog, log_entry
from fxhybrid.federated.server.scheduler import Scheduler
from fxhybrid.federated.tasks.tasks import Score

_log = logging.getLogger(__name__)


class Driver:
    """Runs one federated job."""

    def __init__(
        self,
        transport: Transport,
        scheduler: Scheduler,
        arrays: Arrays,
        *,
        evaluate: Callable[[Arrays], Score],
        of: Mapping[str, Any],
        kept: Mapping[str, float] | None = None,
        log: Path | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Joins the parts.

        Args:
            transport: reaches the devices.
            scheduler: says who is asked for what.
            arrays: the initial model.
            evaluate: scores a model.
            of: what is trained by whom, as JSON values; a checkpoint of anything else is refused.
            kept: of the model's buffers, see ``kept_by_step``.
            log: JSON lines of every round go here.
            checkpoint: written after each round.
        """
        self.transport, self.scheduler, self.arrays = transport, scheduler, arrays
        self.policy, self.of = scheduler.policy, dict(of)
        self.evaluate = evaluate
        self.kept = dict(kept or {})
        self.log = RunLog(log) if log else None
        self.checkpoint = checkpoint
        self.round = 0
        self.clock_s = 0.0
        self.outcomes: Counter[str] = Counter()

    # -- running ------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None) -> list[RoundRecord]:
        """Runs all rounds that are left; returns their records."""
        total, name = self.scheduler.settings.rounds, self.policy.name
        bar = progress.add_task(name, total=total, completed=self.round) if progress else None
        records = []
        while self.round < self.scheduler.settings.rounds and self.clock_s < self.scheduler.settings.until_s:
            records.append(self.run_round())
            _log.info("%s", records[-1])
            if progress and bar is not None:
                progress.update(bar, completed=self.round, description=f"{name} {records[-1].score.accuracy:.1%}")
        return records

    def run_round(self) -> RoundRecord:
        """Runs one round to its end, whatever devices do."""
        self.round += 1
        start_s, wanted = self.clock_s, self.scheduler.settings.updates_wanted(self.policy)
        refused = self._reports()
        deadline_s, selection = self._launch()
        most = self.policy.part_of(len(self.scheduler.open))
        selections = [selection]
        replies: list[Reply] = []
        updates: list[Update] = []
        while len(updates) < wanted and len(replies) < most and (found := self._receive()) is not None:
            reply, request = found
            replies.append(reply)
            if reply.outcome is Outcome.OK:
                updates.append(self._update(reply, request))
            if self.policy.is_async and len(updates) < wanted and len(replies) < most:
                selections.append(self._launch()[1])
        if not replies:
            self.clock_s += deadline_s  # nobody can take part; look again later
        unused = [] if self.policy.is_async else self._drop()
        self.arrays = average(self.arrays, updates)
        outcomes = {reply.device: reply.outcome.value for reply in [*replies, *unused]}
        self.outcomes.update(reply.outcome.value for reply in [*replies, *unused])
        entries = {reply.device: log_entry(reply) for reply in replies}
        elapsed_s = self.clock_s - start_s
        record = RoundRecord(
            self.round, self.clock_s, elapsed_s, deadline_s, outcomes, entries, self.evaluate(self.arrays)
        )
        self._write(record, selections, [update.device for update in updates], refused)
        return record

    def _reports(self) -> list[str]:
        """Asks devices for their memory; returns the reports that were refused, in words."""
        requests = self.scheduler.report_requests(self.transport.devices(), self.round, self.clock_s)
        replies = self.transport.ask(requests) if requests else []
        refused = self.scheduler.take_reports(replies, self.clock_s)
        self.clock_s += max((reply.elapsed_s for reply in replies), default=0.0)
        return refused

    def _launch(self) -> tuple[float, Selection]:
        """Has devices train wherever there is a free place; returns their deadline, too."""
        found = self.scheduler.launch(self.transport.devices(), self.arrays, self.round, self.clock_s)
        self.transport.send(found.requests)
        return found.deadline_s, found.selection

    def _receive(self) -> tuple[Reply, Request] | None:
        """Waits for the next reply, moves the clock to it and learns from it."""
        reply = self.transport.receive()
        if reply is None:
            return None
        arrival_s = self.scheduler.open[reply.device].now_s + reply.elapsed_s
        self.clock_s = max(self.clock_s, arrival_s)
        return self.scheduler.take_reply(reply, self.arrays, self.round)

    def _update(self, reply: Reply, request: Request) -> Update:
        weight, age = weight_of(reply, self.policy.weighting), self.round - request.round
        if not age:
            return Update(reply.device, reply.arrays, weight)
        current = self.scheduler.fleet.part(self.arrays, request.payload["width"])
        arrays = rebased(reply, request.arrays, current, self.kept)
        return Update(reply.device, arrays, weight * staleness_weight(age))

    def _drop(self) -> list[Reply]:
        """Lets go of devices that still train."""
        unused = [failed(request, Outcome.UNUSED, 0.0, "") for request in self.scheduler.open.values()]
        self.scheduler.open.clear()
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
            Checkpoint(self.arrays, self._state(), list(self.scheduler.open.values())).save(self.checkpoint)

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "round": self.round,
            "clock_s": self.clock_s,
            "outcomes": dict(self.outcomes),
            "scheduler": self.scheduler.to_state(),
        }

    def _identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to go on; it may get longer."""
        settings = dataclasses.asdict(self.scheduler.settings)
        del settings["rounds"], settings["until_s"]
        of = {"policy": self.policy.name, "settings": settings, "fingerprint": self.scheduler.fleet.fingerprint}
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
        self.outcomes = Counter(state["outcomes"])
        self.scheduler.restore(state["scheduler"], found.requests)
        self.transport.send(found.requests)
        if self.log is not None:
            self.log.drop_after(self.round)
