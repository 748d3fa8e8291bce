"""Options of a run: its policy (the method or a baseline) and its settings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.compact_updates import BITS, FULL_BITS
from fxhybrid.federated.server.fleet_planner import Technique

DEADLINE = 2.0
BUFFER_SHARE = 0.5  # of a synchronous round's updates: a staler model is worth less than one that moves on more often
ASYNC = "-async"


@dataclass(frozen=True)
class Policy:
    """Says how rounds are run.

    Attributes:
        name: as tables call it.
        technique: which plans devices get.
        selector: name of the client selector.
        forecast: ``"conformal"``, ``"last"`` reading, or ``"none"``: memory is not looked at.
        gate: only devices that a plan fits are chosen; else those too, which then run the smallest there is.
        elastic: devices move between plans, and wait between steps where none fits.
        mu: weight of FedProx's proximal term.
        widths: of the models that devices may train; below 1 a device trains the widest that fits (HeteroFL).
        is_limited: False for the upper bound: no memory limit.
        is_async: devices start and are counted at any time, with half as many updates to a round (FedBuff).
    """

    name: str
    technique: Technique = Technique.HYBRID
    selector: str = "utility"
    forecast: str = "conformal"
    gate: bool = True
    elastic: bool = True
    mu: float = 0.0
    widths: tuple[float, ...] = (1.0,)
    is_limited: bool = True
    is_async: bool = False

    @property
    def weighting(self) -> str:
        """Returns how to average, see ``weight_of``: selectors that prefer much data have counted it already."""
        return "examples" if self.selector == "random" else "uniform"

    def part_of(self, n: int) -> int:
        """Returns how many of ``n`` devices a round waits for: all of them, or half in an asynchronous one."""
        return math.ceil(BUFFER_SHARE * n) if self.is_async else n


@dataclass(frozen=True)
class Settings:
    """Says how long a run is and how much each round does.

    Attributes:
        rounds: to run.
        devices_per_round: updates that a round waits for.
        over_selection: times as many are asked, and the slowest answers dropped; Oort (OSDI 2021) asks 1.3 times.
        local_steps: of each device, at most.
        deadline_s: after which an answer is too late; None for ``DEADLINE`` times the mean time that a device is
            predicted to take, which FedBalancer (MobiSys 2022) gives the methods that it is compared with, and not
            less than for a report.
        report_deadline_s: the same for reports.
        report_every: rounds from one report of devices' memory to the next; they also report when they train.
        seed: of everything random.
        overhead_bytes: that runtime and transport of a device take in addition to training.
        update_bits: of a number in a device's update, 32 or 8; the latter with a scale for each row.
        until_s: no round begins later on the run's clock.
    """

    rounds: int
    devices_per_round: int
    over_selection: float = 1.3
    local_steps: int = 5
    deadline_s: float | None = None
    report_deadline_s: float = 60.0
    report_every: int = 1
    seed: int = 0
    overhead_bytes: int = 0
    update_bits: int = FULL_BITS
    until_s: float = math.inf

    @property
    def n_asked(self) -> int:
        """Returns how many devices train at a time."""
        return math.ceil(self.over_selection * self.devices_per_round)

    def updates_wanted(self, policy: Policy) -> int:
        """Returns how many updates end a round."""
        return policy.part_of(self.devices_per_round)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InvalidArgument: one cannot be used.
        """
        for name in ("rounds", "devices_per_round", "local_steps", "report_every", "over_selection"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.update_bits not in (BITS, FULL_BITS):
            raise InvalidArgument(f"update_bits is {self.update_bits}; it must be {BITS} or {FULL_BITS}")
        if self.overhead_bytes < 0 or (self.deadline_s is not None and not self.deadline_s > 0):
            raise InvalidArgument("overhead_bytes is at least 0, deadline_s above 0 or None")


_UNMODIFIED = Technique.SAVE_ALL

POLICIES = {
    policy.name: policy
    for policy in (
        Policy("fxhybrid"),
        Policy("exclude", _UNMODIFIED, selector="random", elastic=False),
        Policy("random", _UNMODIFIED, selector="random", forecast="none", gate=False, elastic=False),
        Policy("oort-fedprox", _UNMODIFIED, selector="oort", forecast="none", gate=False, elastic=False, mu=0.01),
        Policy("recompute-only", Technique.RECOMPUTE),
        Policy("compress-only", Technique.COMPRESS),
        Policy("heterofl", _UNMODIFIED, selector="random", elastic=False, widths=(1.0, 0.75, 0.5, 0.25)),
        Policy("no-limit", _UNMODIFIED, forecast="none", gate=False, elastic=False, is_limited=False),
        Policy("last-reading", forecast="last"),
        Policy("not-elastic", elastic=False),
        Policy("random-selection", selector="random"),
    )
}


def policy_of(name: str) -> Policy:
    """Looks up a policy by its name; ``-async`` at its end has its rounds run asynchronously.

    Raises:
        InvalidArgument: there is none of that name.
    """
    base = name.removesuffix(ASYNC)
    if base not in POLICIES:
        raise InvalidArgument(f"there is no policy {name!r}; there are {', '.join(POLICIES)}, each also with {ASYNC}")
    return dataclasses.replace(POLICIES[base], name=name, is_async=name != base)
