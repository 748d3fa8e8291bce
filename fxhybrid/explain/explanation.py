"""A plan by module and source line: what was kept before, what is kept now, and what that costs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fxhybrid.capture.joint_graph import Origin
from fxhybrid.console import as_html, as_text
from fxhybrid.explain.planned_step import PlannedStep, Simulated
from fxhybrid.ir.plan import Compress, Plan
from fxhybrid.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

TEXT_WIDTH = 160
MIN_OVERHEAD_S = 5e-6  # what does not show in the table's hundredths of a millisecond
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class ExplainedPlace:
    """Describes what a plan does at one place of the model, or at equal places of repeated layers.

    Attributes:
        place: module path and source line; numbers of repeated layers are ``*``.
        count: how many modules this is the sum of.
        kept_before_bytes: what the unmodified step keeps for the backward pass.
        kept_bytes: what the planned step keeps, encoded forms included.
        actions: how many tensors that the backward pass reads are treated how.
        overhead_s: seconds that the plan adds here.
        peak_bytes: what was made here and is alive at the planned step's peak.
        names: of the tensors that the unmodified step keeps, as in ``plan.actions`` and ``compression_refusals``.
    """

    place: Origin
    count: int = 0
    kept_before_bytes: int = 0
    kept_bytes: int = 0
    actions: Mapping[str, int] = field(default_factory=dict)
    overhead_s: float = 0.0
    peak_bytes: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Explains a plan by module path and source line; prints as a table with repeated layers joined.

    Attributes:
        places: one entry per module and line, those that kept most before first.
        plan: what is explained.
        save_all_bytes: simulated peak of the unmodified step.
        workspace_bytes: passing memory of the operator at the planned step's peak.
        resident: bytes that are there through the whole step, by kind.
        peak_at: where the planned step peaks, in words.
    """

    places: tuple[ExplainedPlace, ...]
    plan: Plan
    save_all_bytes: int
    workspace_bytes: int
    resident: Mapping[str, int]
    peak_at: str

    def __rich__(self) -> Table:
        from rich.table import Table

        plan = self.plan
        table = Table(title=f"What the plan for {format_bytes(plan.budget_bytes)} does", caption=self._caption())
        for name in ("module", "class", "line", "actions"):
            table.add_column(name, overflow="fold")
        for name in ("kept before", "kept now", "added time", "of the peak"):
            table.add_column(name, justify="right")
        for place in joined(self.places):
            table.add_row(
                f"{f'{place.count} x ' if place.count > 1 else ''}{place.place.module or '(the model)'}",
                place.place.kind,
                place.place.line,
                ", ".join(f"{count} {action}" for action, count in place.actions.items()),
                format_bytes(place.kept_before_bytes),
                format_bytes(place.kept_bytes),
                f"{place.overhead_s * 1e3:.2f} ms",
                f"{place.peak_bytes / plan.peak_bytes:.1%}",
            )
        return table

    def _caption(self) -> str:
        plan = self.plan
        kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in self.resident.items() if size)
        return (
            f"peak {format_bytes(plan.peak_bytes)} (unmodified {format_bytes(self.save_all_bytes)}) at {self.peak_at}; "
            f"added {plan.added_s * 1e3:.1f} ms on {plan.step_s * 1e3:.1f} ms; there all the time: {kinds}; "
            f"workspace at the peak {format_bytes(self.workspace_bytes)}"
        )

    def __str__(self) -> str:
        return as_text(self.__rich__(), TEXT_WIDTH)

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def explain(step: PlannedStep, plan: Plan, peak_at: str) -> Explanation:
    """Explains a plan.

    Args:
        step: the plan beside the unmodified step.
        plan: its figures.
        peak_at: where it peaks, in words.
    """
    before, now = _kept(step, step.unmodified), _kept(step, step.planned)
    actions = _actions(step, plan)
    seconds = _seconds(step, step.planned)
    for place, spent in _seconds(step, step.unmodified).items():
        seconds[place] -= spent
    (alive, workspace_bytes), names = _at_peak(step), _names(step)
    found = [
        ExplainedPlace(
            place,
            1,
            before[place],
            now[place],
            actions.get(place, Counter()),
            seconds[place],
            alive[place],
            tuple(names.get(place, ())),
        )
        for place in {**before, **now, **actions, **seconds, **alive}
        if before[place] or now[place] or alive[place] or abs(seconds[place]) > MIN_OVERHEAD_S
    ]
    found.sort(key=lambda place: place.kept_before_bytes, reverse=True)
    peak_bytes = step.unmodified.timeline.peak_bytes
    return Explanation(tuple(found), plan, peak_bytes, workspace_bytes, step.resident, peak_at)


def joined(places: Iterable[ExplainedPlace]) -> list[ExplainedPlace]:
    """Adds up equal lines of modules whose paths differ by numbers only: the layers of a stack."""
    groups: dict[Origin, list[ExplainedPlace]] = {}
    for place in places:
        key = replace(place.place, module=_NUMBER.sub("*", place.place.module))
        groups.setdefault(key, []).append(place)
    added = [
        ExplainedPlace(
            key if len(group) > 1 else group[0].place,
            len(group),
            sum(place.kept_before_bytes for place in group),
            sum(place.kept_bytes for place in group),
            sum((Counter(place.actions) for place in group), Counter()),
            sum(place.overhead_s for place in group),
            sum(place.peak_bytes for place in group),
            tuple(name for place in group for name in place.names),
        )
        for key, group in groups.items()
    ]
    return sorted(added, key=lambda place: place.kept_before_bytes, reverse=True)


def _kept(step: PlannedStep, simulated: Simulated) -> Counter[Origin]:
    """Bytes that a step hands from forward to backward, by place."""
    kept: Counter[Origin] = Counter()
    for number in simulated.schedule.stored:
        value = simulated.schedule.values[number]
        kept[step.tensors[value.tensor]] += value.size_bytes
    return kept


def _names(step: PlannedStep) -> dict[Origin, list[str]]:
    """Names of the tensors that the unmodified step hands from forward to backward, by place."""
    found: dict[Origin, list[str]] = {}
    schedule = step.unmodified.schedule
    for number in schedule.stored:
        tensor = schedule.values[number].tensor
        found.setdefault(step.tensors[tensor], []).append(step.problem.tensors[tensor].name)
    return found


def _actions(step: PlannedStep, plan: Plan) -> dict[Origin, Counter[str]]:
    """How many of the tensors that the plan decides on are treated how, by place; kept ones are left out."""
    found: dict[Origin, Counter[str]] = {}
    for name, action in plan.actions.items():
        word = action.codec.split(":")[0] if isinstance(action, Compress) else str(action)
        found.setdefault(step.tensors[step.problem.index[name]], Counter())[word] += 1
    return found


def _seconds(step: PlannedStep, simulated: Simulated) -> Counter[Origin]:
    spent: Counter[Origin] = Counter()
    schedule = simulated.schedule
    for place, instruction in zip(step.places(schedule), schedule.instructions, strict=True):
        spent[place] += instruction.seconds  # type: ignore[assignment]  # a Counter adds up seconds as well
    return spent


def _at_peak(step: PlannedStep) -> tuple[Counter[Origin], int]:
    """Bytes alive at the planned step's peak by place, and how far the operator there rises above them."""
    problem, timeline = step.problem, step.planned.timeline
    schedule = step.planned.schedule
    in_forward = timeline.peak_at < schedule.n_forward
    alive: Counter[Origin] = Counter()
    for value, birth, death in zip(schedule.values, timeline.birth, timeline.death, strict=True):
        if birth <= timeline.peak_at <= death:
            alive[step.tensors[value.tensor]] += value.size_bytes
    base = problem.forward_base_bytes if in_forward else problem.backward_base_bytes
    return alive, timeline.peak_bytes - base - alive.total()
