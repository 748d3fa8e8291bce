"""Trains on a real device, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from fxhybrid.devices.device_profile import DeviceProfile
from fxhybrid.federated.client.local_steps import LocalWork
from fxhybrid.federated.protocol.messages import Kind, Outcome, Reply, Request, failed
from fxhybrid.federated.protocol.transport import is_out_of_memory
from fxhybrid.federated.tasks.named_tasks import load_task
from fxhybrid.ir.plan import Plan
from fxhybrid.profiling.system_memory import available_bytes, data_limit

GUARD_SLACK_BYTES = 64 << 20  # what libraries and the C library take in addition to the tensors of a step
ASSUMED_BYTES_PER_S = 1e6


def introduction(request: Request, free_bytes: int, n_examples: int) -> dict[str, Any]:
    """Makes the payload of a device's report; the first one has what the server assumes until it is measured."""
    payload: dict[str, Any] = {"n_examples": n_examples, "readings": [[request.now_s, free_bytes]]}
    if request.payload["introduce"]:
        payload |= {"bytes_per_s": ASSUMED_BYTES_PER_S, "profile": DeviceProfile().to_json()}
    return payload


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
        self.start_s = time.monotonic()
        self.steps_s = 0.0
        self.readings: list[tuple[float, int]] = []

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> ProcessMemoryMonitor:
        """Makes the monitor of a node: its ``budget-bytes`` is the limit, ``hard-guard`` 1 guards every step."""
        limit = node_config.get("budget-bytes")
        return cls(None if limit is None else int(limit), is_guarded=bool(node_config.get("hard-guard", 0)))

    def available_bytes(self) -> int:
        """Returns the bytes that a training step may take now; keeps the reading, by the seconds since the start."""
        free = available_bytes()
        free = free if self.limit_bytes is None else min(free, self.limit_bytes)
        self.readings.append((self.elapsed_s(), free))
        return free

    def elapsed_s(self) -> float:
        """Returns the seconds since this monitor was made."""
        return time.monotonic() - self.start_s

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        """Runs one step; under the guard, taking more than planned is an error instead of a kill."""
        start_s = self.elapsed_s()
        try:
            with data_limit(plan.peak_bytes + self.slack_bytes) if self.is_guarded else nullcontext():
                return step()
        finally:
            self.steps_s += self.elapsed_s() - start_s

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
        self.monitor = ProcessMemoryMonitor.of(node_config)

    def answer(self, request: Request) -> Reply:
        """Answers with a reply, also where memory runs out."""
        monitor = self.monitor
        task = load_task(str(self.run_config["task"]), int(self.node_config["num-partitions"]), self.run_config["seed"])
        data = list(task.clients.values())[int(self.node_config["partition-id"])]
        if request.kind is Kind.REPORT:
            payload = introduction(request, monitor.available_bytes(), data.n_examples)
            return Reply(request.device, request.round, Outcome.OK, monitor.elapsed_s(), payload)
        from fxhybrid.federated.client.trainer import Trainer  # capture takes torch's compiler, a report does not

        work = LocalWork.from_payload(request.payload)
        try:
            result = Trainer(task, work.width, plan=work.plans[0]).train(request.arrays, work, data, monitor)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return failed(request, Outcome.OOM, monitor.elapsed_s(), str(error))
        readings = [[request.now_s + t_s, free] for t_s, free in monitor.readings]
        busy_s = monitor.elapsed_s()
        measured = result.measured(data.n_examples, steps_s=monitor.steps_s, busy_s=busy_s, readings=readings)
        return result.reply(request, busy_s, measured)
