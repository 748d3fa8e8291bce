"""A strategy of Flower's that plans and selects; averaging, evaluation and wrappers around it stay Flower's own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fxhybrid.federated.flower.grid_transport import FlowerTransport
from fxhybrid.federated.flower.records import MESSAGE_TYPES, WORK, failed_by, from_json_record, json_record
from fxhybrid.federated.protocol.messages import Arrays, Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.server.build_driver import build_scheduler, planners_of
from fxhybrid.federated.server.policies import Settings, policy_of
from fxhybrid.federated.tasks.tasks import Task


class FxHybridStrategy(FedAvg):
    """Adds forecast, plan and selection to FedAvg, or to another of its subclasses.

    Devices need :class:`fxhybrid.federated.flower.client_mod.FxHybridMod`. A round waits for all devices that it asked,
    as Flower's strategies do. For another strategy name both: ``class Mine(FxHybridStrategy, FedAdam)``.

    Args:
        task: model, loss and a batch of the shape that devices train on.
        policy: name of a policy, see ``policies.py``; its weights of updates are left to Flower.
        settings: of the run; without any, of rounds of two devices.
        options: of the other strategy.
    """

    def __init__(
        self, task: Task, *, policy: str = "fxhybrid", settings: Settings | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if settings is None:
            # every message starts a process on the device, which a small one takes a while for
            settings = Settings(1, 2, over_selection=1.0, report_deadline_s=120.0, report_every=5)
        chosen = policy_of(policy)
        self.scheduler = build_scheduler(task, planners_of(task, chosen), chosen, settings)
        self._start_s = time.monotonic()
        self._grid: Grid | None = None
        self._round = 0
        self._model: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configures a round; devices are chosen when the other strategy has their messages made."""
        self._grid, self._round = grid, server_round
        self._model = {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def _construct_messages(self, record: RecordDict, node_ids: list[int], message_type: str) -> Iterable[Message]:
        """Makes the messages of a round: for training, each chosen device gets a record of its own."""
        if message_type != MESSAGE_TYPES[Kind.TRAIN] or self._grid is None:
            return super()._construct_messages(record, node_ids, message_type)
        transport = FlowerTransport(self._grid)
        devices = transport.devices()
        requests = self.scheduler.report_requests(devices, self._round, self._now_s())
        refused = self.scheduler.take_reports(transport.ask(requests), self._now_s())
        launch = self.scheduler.launch(devices, self._model, self._round, self._now_s())
        for text in refused:
            log(INFO, "fxhybrid: refused a report: %s", text)
        return [
            Message(RecordDict({**record, WORK: _work_record(request)}), int(request.device), message_type)
            for request in launch.requests
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learns from the replies, and hands those that can be used to the other strategy."""
        usable, outcomes = [], Counter[str]()
        for message in replies:
            request = self.scheduler.open.get(str(message.metadata.src_node_id))
            if request is None:
                continue  # the SuperLink's own word on a node that left: it stays without an answer
            reply, _ = self.scheduler.take_reply(self._reply(message, request), self._model, server_round)
            outcomes[reply.outcome.value] += 1
            if reply.outcome is Outcome.OK:
                del message.content[WORK]
                usable.append(message)
            else:
                log(INFO, "fxhybrid: node %s: %s %s", reply.device, reply.outcome.value, reply.detail)
        for request in list(self.scheduler.open.values()):
            lost = failed(request, Outcome.LOST, self._now_s() - request.now_s, "no answer")
            self.scheduler.take_reply(lost, self._model, server_round)
            outcomes[lost.outcome.value] += 1
        log(INFO, "fxhybrid: round %s: %s", server_round, ", ".join(f"{n} {name}" for name, n in outcomes.items()))
        return super().aggregate_train(server_round, usable)

    def _reply(self, message: Message, request: Request) -> Reply:
        """Reads what a device trained and measured. When it answered is not known, only that all have."""
        elapsed_s = self._now_s() - request.now_s
        if message.has_error():
            return failed_by(message, request, elapsed_s)
        try:
            payload = from_json_record(message.content.config_records[WORK])
            held = next(iter(message.content.array_records.values()))
            arrays = {name: array.numpy() for name, array in held.items()}
        except Exception as error:  # noqa: BLE001 - a foreign client may send anything
            return failed(request, Outcome.INVALID, elapsed_s, f"not a reply: {error!r}")
        payload.pop("busy_s", None)
        return Reply(request.device, request.round, Outcome.OK, elapsed_s, payload, arrays)

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s


def _work_record(request: Request) -> ConfigRecord:
    return json_record({**request.payload, "now_s": request.now_s})
