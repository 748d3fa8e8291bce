"""A plan: what to do with each tensor, and what that is predicted to cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from fxhybrid.errors import PlanMismatchError
from fxhybrid.ir.json_text import from_json, to_json
from fxhybrid.units import format_bytes

PLAN_FORMAT = 1
TUPLE_FIELDS = ("without_gradient", "dropped", "channels_last")  # left out of the JSON form where they are empty
LEAST_STEP_S = 1e-12  # where a step takes no time at all
GAP_FLOOR_SHARE = 1e-3  # of the step: added seconds below that count as that in the gap


class Tier(Enum):
    """Lists how near to eager's results are: the very bits, equal but for rounding, or within an error."""

    LOSSLESS = "lossless"
    REORDERED = "reordered"
    LOSSY = "lossy"

    def __str__(self) -> str:
        return self.value


class Simple(Enum):
    """Lists the actions without a parameter; the other one is ``Compress``."""

    SAVE = "save"
    RECOMPUTE = "recompute"

    def __str__(self) -> str:
        return self.value


SAVE, RECOMPUTE = Simple.SAVE, Simple.RECOMPUTE


@dataclass(frozen=True)
class Compress:
    """Keeps the tensor encoded by ``codec``."""

    codec: str

    def __str__(self) -> str:
        return f"compress({self.codec})"


Action = Simple | Compress
Actions = Mapping[int, Action]


def parse_action(text: str) -> Action:
    """Reads the action that ``str`` wrote.

    Raises:
        ValueError: the text is no action.
    """
    if text.startswith("compress(") and text.endswith(")"):
        return Compress(text[len("compress(") : -1])
    return Simple(text)


@dataclass(frozen=True)
class GradientError:
    """Holds the relative error of all parameter gradients: its value and whether it was measured or estimated."""

    value: float
    source: str

    def __str__(self) -> str:
        return f"{self.value:.2g} ({self.source})"


def relative_gap(overhead_s: float, lower_bound_s: float, step_s: float) -> float:
    """Computes (added - bound) / max(added, 0.1 % of the step)."""
    return (overhead_s - lower_bound_s) / max(overhead_s, GAP_FLOOR_SHARE * step_s, LEAST_STEP_S)


def _check_fields(raw: Mapping[str, Any]) -> None:
    """Refuses values of a plan's fields that are of another type, or not finite.

    Raises:
        ValueError: names field and value.
    """
    counts, seconds = ("budget_bytes", "peak_bytes"), ("added_s", "lower_bound_s", "step_s", "solve_s")
    texts = ("status", "solver", "graph_fingerprint", "device")
    wrong = [name for name in counts if type(raw[name]) is not int or raw[name] < 0]
    wrong += [name for name in seconds if type(raw[name]) not in (int, float) or not math.isfinite(raw[name])]
    wrong += [name for name in texts if not isinstance(raw[name], str)]
    wrong += [name for name in ("versions", "actions") if not isinstance(raw[name], dict)]
    error = raw["gradient_error"]
    if type(error.value) not in (int, float) or math.isnan(error.value) or not isinstance(error.source, str):
        wrong.append("gradient_error")
    if wrong:
        raise ValueError(f"{wrong[0]} is {raw[wrong[0]]!r}")


@dataclass(frozen=True)
class Plan:
    """Holds all decisions for one graph and one budget.

    Attributes:
        budget_bytes: the budget that it was made for.
        peak_bytes: predicted peak of the step.
        added_s: predicted seconds beyond the save-all step.
        lower_bound_s: no plan for this budget adds less.
        step_s: predicted seconds of the save-all step.
        gradient_error: relative error of the parameter gradients.
        status: OPTIMAL, FEASIBLE or UNKNOWN.
        solver: which solver it came from.
        solve_s: seconds spent on solving.
        actions: tensor name -> action; tensors not named are saved.
        graph_fingerprint: hash of the graph's structure, shapes and types.
        versions: fxhybrid and torch versions that it was made with.
        device: what the profile was taken on.
        without_gradient: positions of the graph's outputs that are planned to get no gradient.
        dropped: positions of those that the caller is planned to drop before the backward pass begins.
        channels_last: groups of operators that run in channels_last, as ``passes/channels_last.py`` numbers them.
        exactness: how near to eager's the results are.
    """

    budget_bytes: int
    peak_bytes: int
    added_s: float
    lower_bound_s: float
    step_s: float
    gradient_error: GradientError
    status: str
    solver: str
    solve_s: float
    actions: Mapping[str, Action]
    graph_fingerprint: str
    versions: Mapping[str, str]
    device: str
    without_gradient: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    channels_last: tuple[int, ...] = ()
    exactness: Tier = Tier.LOSSLESS

    @property
    def gap(self) -> float:
        """``relative_gap`` of this plan."""
        return relative_gap(self.added_s, self.lower_bound_s, self.step_s)

    def counts(self) -> dict[str, int]:
        """Counts the tensors that each kind of action was chosen for (codec parameters left out)."""
        counts: dict[str, int] = {}
        for action in self.actions.values():
            kind = str(action).split(":")[0] + (")" if ":" in str(action) else "")
            counts[kind] = counts.get(kind, 0) + 1
        return dict(sorted(counts.items()))

    def _backward_lines(self) -> list[tuple[str, str]]:
        named = (("without gradient", self.without_gradient), ("dropped", self.dropped))
        return [(name, f"outputs {', '.join(map(str, outputs))}") for name, outputs in named if outputs]

    def to_json(self) -> str:
        """Writes this plan as JSON text."""
        raw = dataclasses.asdict(dataclasses.replace(self, actions={}))
        raw["exactness"] = self.exactness.value
        raw["actions"] = {name: str(action) for name, action in self.actions.items()}
        for name in TUPLE_FIELDS:
            if not raw[name]:
                del raw[name]
        return to_json(raw, version=PLAN_FORMAT)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads the plan that ``to_json`` wrote.

        Raises:
            PlanMismatchError: the text is no plan, is cut off, or is of another format version.
        """

        def build(raw: dict[str, Any]) -> Plan:
            raw["gradient_error"] = GradientError(**raw["gradient_error"])
            _check_fields(raw)
            usual = Tier.LOSSY if raw["gradient_error"].value > 0 else Tier.LOSSLESS  # of plans from before tiers
            raw["exactness"] = Tier(raw.get("exactness", usual))
            raw["actions"] = {name: parse_action(action) for name, action in raw["actions"].items()}
            raw |= {name: tuple(raw[name]) for name in TUPLE_FIELDS if name in raw}
            return cls(**raw)

        message = "this is not a plan written by fxhybrid (or it is cut off); make one with fxhybrid.plan"
        return from_json(text, build, PlanMismatchError, message, version=PLAN_FORMAT)

    def save(self, path: str | Path) -> None:
        """Writes the JSON form to ``path``."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what ``save`` wrote; raises ``PlanMismatchError`` as ``from_json`` does."""
        return cls.from_json(Path(path).read_text(encoding="utf-8", errors="replace"))

    def __str__(self) -> str:
        lines = [
            ("budget", format_bytes(self.budget_bytes)),
            ("predicted peak", format_bytes(self.peak_bytes)),
            ("added time", f"{self.added_s * 1e3:.2f} ms on {self.step_s * 1e3:.1f} ms"),
            ("status", f"{self.status} ({self.solver}, gap {self.gap:.1%}, {self.solve_s:.2f} s)"),
            ("exactness", str(self.exactness)),
            ("gradient error", str(self.gradient_error)),
            *self._backward_lines(),
            *((kind, f"{count} tensors") for kind, count in self.counts().items()),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
