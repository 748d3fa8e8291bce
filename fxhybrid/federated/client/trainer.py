"""Local training on a device by the plan it got, changing to a smaller one where memory falls."""

from __future__ import annotations

import functools
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Arrays, Payload
from fxhybrid.federated.protocol.model_arrays import load_arrays, to_arrays
from fxhybrid.federated.tasks.captured_step import capture_step, make_optimizer
from fxhybrid.federated.tasks.data import ClientData
from fxhybrid.federated.tasks.tasks import Task
from fxhybrid.ir.plan import Plan

RETRY_S = 5.0  # after finding too little memory for any plan
FREE_SHARE = 0.9  # of what is free before a step that its plan may take: it may fall while the step runs


class MemoryMonitor(Protocol):
    """Watches a device's memory and clock, real or simulated."""

    def available_bytes(self) -> int:
        """Returns the bytes that a training step may take now."""
        ...

    def run_step(self, step: Callable[[], float], plan: Plan) -> float:
        """Runs one step of ``plan``.

        Raises:
            MemoryError: memory ran out under it.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Lets time pass."""
        ...


@dataclass(frozen=True)
class LocalWork:
    """Describes what a device shall train.

    Attributes:
        plans: the one to start with, then smaller ones to move to; by falling peak.
        n_steps: local steps.
        mu: weight of FedProx's proximal term; 0 for none.
        seed: of the order of the examples.
        elastic: whether to move between the plans; else the first is used whatever memory does.
        patience_s: for which an elastic device may wait in all, between steps, where no plan fits.
        width: of the model.
    """

    plans: tuple[Plan, ...]
    n_steps: int
    mu: float
    seed: tuple[int, ...]
    elastic: bool
    patience_s: float = 0.0
    width: float = 1.0

    @classmethod
    def from_payload(cls, payload: Payload) -> LocalWork:
        """Reads the work that a request describes.

        Raises:
            InvalidArgument: it asks for something that is none.
            PlanMismatchError: a plan cannot be read.
        """
        plans = tuple(_parsed(text) for text in payload["plans"])
        n_steps, mu, width = payload["n_steps"], float(payload["mu"]), float(payload["width"])
        patience_s = float(payload["patience_s"])
        if not plans or not isinstance(n_steps, int) or n_steps < 1 or not (math.isfinite(mu) and mu >= 0):
            raise InvalidArgument(f"cannot train {n_steps!r} steps by {len(plans)} plans with mu {mu!r}")
        if not (math.isfinite(patience_s) and patience_s >= 0):
            raise InvalidArgument(f"cannot wait for {patience_s!r} s")
        seed = tuple(int(part) for part in payload["seed"])
        return cls(plans, n_steps, mu, seed, bool(payload["elastic"]), patience_s, width)


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> Plan:
    return Plan.from_json(text)


@dataclass(frozen=True)
class LocalResult:
    """Holds the result of local training.

    Attributes:
        arrays: the trained model.
        loss: mean over the local steps.
        squared_loss: mean of the steps' squared losses: Oort's data utility, taken per batch instead of per example.
        peak_bytes: the largest planned peak among the plans that ran.
        n_moves: how often the plan changed.
        n_steps: that were made: fewer than asked for where memory stayed away.
    """

    arrays: Arrays
    loss: float
    squared_loss: float
    peak_bytes: int
    n_moves: int
    n_steps: int


class Trainer:
    """Trains one model by its planned step; serves one device at a time."""

    def __init__(self, task: Task, width: float = 1.0, *, plan: Plan | None = None) -> None:
        """Captures and compiles the step.

        Args:
            task: what to train.
            width: of the model.
            plan: to carry out first; without one, all plans for this device are made.
        """
        self.task = task
        self.model, self.hybrid = capture_step(task, width, plan=plan)

    def train(self, arrays: Arrays, work: LocalWork, data: ClientData, monitor: MemoryMonitor) -> LocalResult:
        """Trains ``arrays`` on the data.

        Raises:
            PlanMismatchError: a plan belongs to another graph.
            MemoryError: memory ran out, or there was never enough for the smallest plan.
        """
        load_arrays(self.model, arrays)
        self.model.train()
        optimizer = make_optimizer(self.task, self.model)
        start = [p.detach().clone() for p in self.model.parameters()] if work.mu else []
        batches = data.batches(self.task.batch_size, work.seed)
        losses: list[float] = []
        current, peak_bytes, n_moves, patience_s = work.plans[0], 0, 0, work.patience_s
        while len(losses) < work.n_steps:
            available_bytes = monitor.available_bytes()
            chosen = _plan_for(work, available_bytes) if work.elastic else current
            if chosen is None and patience_s > 0:
                monitor.wait(RETRY_S)
                patience_s -= RETRY_S
                continue
            if chosen is None and losses:
                break  # what is learned so far is worth sending
            if chosen is None:
                smallest = work.plans[-1].peak_bytes
                raise MemoryError(f"{available_bytes} bytes are left, the smallest plan takes {smallest}")
            n_moves += chosen is not current
            current, peak_bytes = chosen, max(peak_bytes, chosen.peak_bytes)
            self.hybrid.use_plan(current)
            inputs, targets = next(batches)
            loss = monitor.run_step(lambda x=inputs, y=targets: self._gradients(x, y), current)  # type: ignore[misc]
            self._update(optimizer, start, work.mu)
            losses.append(loss)
        squared = sum(loss * loss for loss in losses) / len(losses)
        loss = sum(losses) / len(losses)
        return LocalResult(to_arrays(self.model), loss, squared, peak_bytes, n_moves, len(losses))

    def _gradients(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = self.hybrid(inputs, loss_args=(targets,))
        loss.backward()
        return float(loss.detach())

    def _update(self, optimizer: torch.optim.Optimizer, start: Sequence[torch.Tensor], mu: float) -> None:
        with torch.no_grad():
            for parameter, origin in zip(self.model.parameters(), start, strict=False):
                if parameter.grad is not None:  # FedProx: the gradient of mu/2 ||w - origin||^2
                    parameter.grad.add_(parameter - origin, alpha=mu)
        optimizer.step()
        self.model.zero_grad(set_to_none=True)


def _plan_for(work: LocalWork, available_bytes: int) -> Plan | None:
    """Returns the largest plan that fits what is left with some to spare, else the smallest if that fits at all."""
    limits = [FREE_SHARE * available_bytes] * (len(work.plans) - 1) + [available_bytes]
    return next((plan for plan, limit in zip(work.plans, limits, strict=True) if plan.peak_bytes <= limit), None)


class TrainerPool:
    """Shares trainers between the devices of one process, one per width and worker."""

    def __init__(self, make: Callable[[float], Trainer], workers: int = 1) -> None:
        """Makes nothing yet.

        Args:
            make: a trainer of a width.
            workers: trainers of one width at most.
        """
        self.make = make
        self.workers = workers
        self._free: dict[float, queue.Queue[Trainer | None]] = {}

    def open(self, width: float) -> None:
        """Opens the pool for a width; call it before threads do."""
        if width not in self._free:
            self._free[width] = queue.Queue()
            for _ in range(self.workers):
                self._free[width].put(None)

    @contextmanager
    def trainer(self, width: float) -> Iterator[Trainer]:
        """Waits for a free trainer and lends it."""
        free = self._free[width]
        trainer = free.get()
        try:
            trainer = trainer or self.make(width)
            yield trainer
        finally:
            free.put(trainer)


def training_payload(result: LocalResult, data: ClientData) -> dict[str, Any]:
    """Makes what a device reports about its training in addition to the model."""
    return {
        "n_examples": data.n_examples,
        "loss": result.loss,
        "squared_loss": result.squared_loss,
        "peak_bytes": result.peak_bytes,
        "n_moves": result.n_moves,
        "n_steps": result.n_steps,
    }
