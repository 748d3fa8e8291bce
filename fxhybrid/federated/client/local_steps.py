"""Local steps of one training on a device: which plan each runs by, when to wait for memory and when to stop."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Payload
from fxhybrid.ir.plan import Plan

RETRY_S = 5.0  # after finding too little memory for any plan
FREE_SHARE = 0.9  # of what is free before a step that its plan may take: it may fall while the step runs


class MemoryMonitor(Protocol):
    """Watches a device's memory and clock, real or simulated."""

    def available_bytes(self) -> int:
        """Returns the bytes that a training step may take now."""
        ...

    def elapsed_s(self) -> float:
        """Returns the seconds since training began."""
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
        limit_s: no step but the first begins that would end later; what is trained by then is sent.
    """

    plans: tuple[Plan, ...]
    n_steps: int
    mu: float
    seed: tuple[int, ...]
    elastic: bool
    patience_s: float = 0.0
    width: float = 1.0
    limit_s: float = math.inf

    @classmethod
    def from_payload(cls, payload: Payload) -> LocalWork:
        """Reads the work that a request describes.

        Raises:
            InvalidArgument: it asks for something that is none.
            PlanMismatchError: a plan cannot be read.
        """
        plans = tuple(_parsed(text) for text in payload["plans"])
        n_steps, mu, width = payload["n_steps"], float(payload["mu"]), float(payload["width"])
        patience_s, limit_s = float(payload["patience_s"]), float(payload["limit_s"])
        if not plans or not isinstance(n_steps, int) or n_steps < 1 or not (math.isfinite(mu) and mu >= 0):
            raise InvalidArgument(f"cannot train {n_steps!r} steps by {len(plans)} plans with mu {mu!r}")
        if not (math.isfinite(patience_s) and patience_s >= 0) or math.isnan(limit_s):
            raise InvalidArgument(f"cannot wait for {patience_s!r} s within {limit_s!r} s")
        seed = tuple(int(part) for part in payload["seed"])
        return cls(plans, n_steps, mu, seed, bool(payload["elastic"]), patience_s, width, limit_s)


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> Plan:
    return Plan.from_json(text)


def local_steps(work: LocalWork, monitor: MemoryMonitor) -> Iterator[Plan]:
    """Yields the plan of each step; whoever runs the step does so before asking for the next plan.

    Ends early where memory stays away for longer than the device may wait, or where time is over: what is learned so
    far is worth sending.

    Raises:
        MemoryError: there was never enough for the smallest plan.
    """
    n_done, patience_s, step_s = 0, work.patience_s, 0.0
    while n_done < work.n_steps:
        start_s = monitor.elapsed_s()
        if n_done and start_s + step_s > work.limit_s:
            return
        available_bytes = monitor.available_bytes()
        chosen = _plan_for(work, available_bytes) if work.elastic else work.plans[0]
        if chosen is not None:
            yield chosen
            n_done, step_s = n_done + 1, monitor.elapsed_s() - start_s
        elif patience_s > 0 and start_s < work.limit_s:
            monitor.wait(RETRY_S)
            patience_s -= RETRY_S
        elif n_done:
            return
        else:
            smallest = work.plans[-1].peak_bytes
            raise MemoryError(f"{available_bytes} bytes are left, the smallest plan takes {smallest}")


def _plan_for(work: LocalWork, available_bytes: int) -> Plan | None:
    """Returns the largest plan that fits what is left with some to spare, else the smallest if that fits at all."""
    limits = [FREE_SHARE * available_bytes] * (len(work.plans) - 1) + [available_bytes]
    return next((plan for plan, limit in zip(work.plans, limits, strict=True) if plan.peak_bytes <= limit), None)
