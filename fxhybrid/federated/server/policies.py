"""Options of a run: its policy (the method or a baseline) and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.server.fleet_planner import Technique


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

    @property
    def weighting(self) -> str:
        """Returns how to average, see ``weight_of``: selectors that prefer much data have counted it already."""
        return "examples" if self.selector in ("random", "memory-gate") else "uniform"


@dataclass(frozen=True)
class Settings:
    """Says how long a run is and how much each round does.

    Attributes:
        rounds: to run.
        devices_per_round: updates that a round waits for.
        extra_devices: asked in addition to those; the slowest answers are dropped.
        local_steps: of each device.
        deadline_s: after which an answer is too late.
        report_deadline_s: the same for reports.
        seed: of everything random.
        evaluate_every: rounds from one evaluation to the next.
        overhead_bytes: that runtime and transport of a device take in addition to training.
    """

    rounds: int
    devices_per_round: int
    extra_devices: int = 0
    local_steps: int = 5
    deadline_s: float = 600.0
    report_deadline_s: float = 60.0
    seed: int = 0
    evaluate_every: int = 1
    overhead_bytes: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InvalidArgument: one cannot be used.
        """
        for name in ("rounds", "devices_per_round", "local_steps", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.extra_devices < 0 or self.overhead_bytes < 0 or not self.deadline_s > 0:
            raise InvalidArgument("extra_devices and overhead_bytes are at least 0, deadline_s is above 0")


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
    """Looks up a policy by its name.

    Raises:
        InvalidArgument: there is none of that name.
    """
    if name not in POLICIES:
        raise InvalidArgument(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]
