"""Trains on a real device, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.client.trainer import LocalWork, Trainer, training_payload
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.protocol.transport import is_out_of_memory
from fxhybrid.federated.tasks.tasks import Task, digits_task, text_task
from fxhybrid.ir.plan import Plan
from fxhybrid.profiling.system_memory import available_bytes, data_limit

GUARD_SLACK_BYTES = 64 << 20  # what libraries and the C library take in addition to the tensors of a step
ASSUMED_BYTES_PER_S = 1e6


def task_of(config: Mapping[str, Any], n_clients: int) -> Task:
    """Makes the task that a run's configuration names, on server and devices alike."""
    make = text_task if config["task"] == "text" else digits_task
    return make(n_clients, seed=int(config["seed"]))


class ProcessMemoryMonitor:
    """Reads this machine's memory, or what the device may use of it."""

    def __init__(self, limit_bytes: int | None, *, is_guarded: bool, slack_bytes: int = GUARD_SLACK_BYTES) -> None:
        """Keeps the limit.

        Args:
            limit_bytes: that training may use at most; None for all there is.
            is_guarded: hold every step to its plan by a limit of the operating system.
            slack_bytes: that the guard allows above the plan.
        """
        self.limit_bytes = limit_bytes
        self.slack_bytes = slack_bytes
        self.is_guarded = is_guarded

    def available_bytes(self) -> int:
        """Returns the bytes that a training step may take now."""
        free = available_bytes()
        return free if self.limit_bytes is None else min(free, self.limit_bytes)

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        """Runs one step; under the guard, taking more than planned is an error instead of a kill."""
        with data_limit(plan.peak_bytes + self.slack_bytes) if self.is_guarded else nullcontext():
            return step()

    def wait(self, seconds: float) -> None:
        """Sleeps."""
        time.sleep(seconds)


class Node:
    """Answers requests from this process; a new one for every message, as Flower's clients are.

    Node configuration: ``partition-id``, ``num-partitions``; optional ``budget-bytes`` (memory that training may use)
    and ``hard-guard`` (1: every step is held to its plan). Operator times are cached on disk by the profile.
    """

    def __init__(self, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> None:
        """Reads the configuration; loads nothing yet."""
        self.node_config = node_config
        self.run_config = run_config
        limit = node_config.get("budget-bytes")
        is_guarded = bool(node_config.get("hard-guard", 0))
        self.monitor = ProcessMemoryMonitor(None if limit is None else int(limit), is_guarded=is_guarded)

    def answer(self, request: Request) -> Reply:
        """Answers with a reply, also where memory runs out."""
        start = time.monotonic()
        task = task_of(self.run_config, int(self.node_config["num-partitions"]))
        data = list(task.clients.values())[int(self.node_config["partition-id"])]
        if request.kind is Kind.REPORT:
            readings = [[request.now_s, self.monitor.available_bytes()]]
            payload: dict[str, Any] = {"n_examples": data.n_examples, "readings": readings}
            if request.payload["introduce"]:
                payload |= {"bytes_per_s": ASSUMED_BYTES_PER_S, "profile": DeviceProfile().to_json()}
            return Reply(request.device, request.round, Outcome.OK, time.monotonic() - start, payload)
        work = LocalWork.from_payload(request.payload)
        try:
            result = Trainer(task, work.width, plan=work.plans[0]).train(request.arrays, work, data, self.monitor)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return failed(request, Outcome.OOM, time.monotonic() - start, str(error))
        payload = training_payload(result, data)
        return Reply(request.device, request.round, Outcome.OK, time.monotonic() - start, payload, result.arrays)
