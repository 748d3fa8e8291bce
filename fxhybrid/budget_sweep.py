"""Frontier: what every budget costs, from one capture and one profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxhybrid.api import Inputs, plan_now
from fxhybrid.compiler.explained import model_name
from fxhybrid.compiler.planning_state import PlanningState, extend
from fxhybrid.console import as_html, as_text
from fxhybrid.errors import InvalidArgument
from fxhybrid.explain.plot import pyplot, save
from fxhybrid.ir.json_text import from_json, to_json
from fxhybrid.module import one_graph, wrap
from fxhybrid.options import Options
from fxhybrid.solvers.portfolio.extend_plans import ensure, find_smallest_peak, polish_for, prove_bound
from fxhybrid.solvers.portfolio.known_plans import KnownPlans
from fxhybrid.units import Budget, check_size, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_COUNT = 12
FRONTIER_FORMAT = 2
MIB = 1 << 20
STYLES = (("#1f4e79", "o"), ("#c05a00", "s"), ("#6fbf73", "^"))  # dark to light, so that they differ in grey


class Technique(Enum):
    """Names the actions that a plan may use."""

    HYBRID = "hybrid"
    RECOMPUTE = "recompute only"
    COMPRESS = "compress only"


@dataclass(frozen=True)
class FrontierRow:
    """Describes one technique at one budget.

    Attributes:
        budget_bytes: the budget.
        technique: which actions the plan may use.
        status: of the plan; UNKNOWN or INFEASIBLE where the technique does not reach the budget.
        peak_bytes: predicted peak; None where the budget is not reached.
        added_s: predicted seconds beyond the save-all step; None where it is not reached.
        lower_bound_s: no plan of this technique adds less; None where the budget is not reached.
        saved_s_per_mib: about what one MiB more would save, by linear programming; None where it is not reached.
    """

    budget_bytes: int
    technique: Technique
    status: str
    peak_bytes: int | None = None
    added_s: float | None = None
    lower_bound_s: float | None = None
    saved_s_per_mib: float | None = None


@dataclass(frozen=True)
class Frontier:
    """Holds budgets against added time; prints as a table.

    Attributes:
        rows: by budget, the largest first.
        save_all_bytes: simulated peak of the save-all step.
        minimum_bytes: smallest peak for which a plan is known.
        step_s: predicted seconds of the save-all step.
        device: what the profile was taken on.
        model: class name of the model.
    """

    rows: tuple[FrontierRow, ...]
    save_all_bytes: int
    minimum_bytes: int
    step_s: float
    device: str
    model: str = ""

    @property
    def budgets(self) -> list[int]:
        """The budgets in bytes, the largest first."""
        return sorted({row.budget_bytes for row in self.rows}, reverse=True)

    def line(self, technique: Technique) -> list[FrontierRow]:
        """Returns the rows of one technique, the largest budget first."""
        return [row for row in self.rows if row.technique is technique]

    def to_json(self) -> str:
        """Writes this frontier as JSON text."""
        raw = dataclasses.asdict(self)
        raw["rows"] = [{**row, "technique": row["technique"].value} for row in raw["rows"]]
        return to_json(raw, version=FRONTIER_FORMAT)

    @classmethod
    def from_json(cls, text: str) -> Frontier:
        """Reads the frontier that ``to_json`` wrote.

        Raises:
            InvalidArgument: the text is no frontier, is cut off, or is of another format version.
        """

        def build(raw: dict[str, Any]) -> Frontier:
            rows = raw.pop("rows")
            typed = (FrontierRow(**{**row, "technique": Technique(row["technique"])}) for row in rows)
            return cls(tuple(typed), **raw)

        message = "this is not a frontier written by fxhybrid (or it is cut off)"
        return from_json(text, build, InvalidArgument, message, version=FRONTIER_FORMAT)

    def plot(self, path: str | Path) -> None:
        """Writes a plot of added time against budget, one line per technique with its lower bound dotted.

        Budgets that a technique does not reach are crosses at the top. The suffix of ``path`` says the format.

        Raises:
            InvalidArgument: matplotlib is not installed.
        """
        figure, axes = pyplot().subplots(figsize=(7.5, 5), layout="constrained")
        for place, (technique, (colour, marker)) in enumerate(zip(Technique, STYLES, strict=True)):
            self._draw(axes, technique, colour, marker, 0.99 - 0.03 * place, zorder=3 - 0.1 * place)
        axes.plot([], [], ":", color="black", label="lower bound")
        axes.plot([], [], "x", color="black", label="not reached")
        axes.set_title(f"{self.model or 'the model'}: what a budget costs")
        axes.set_xlabel("budget, MiB")
        axes.set_ylabel(f"added time, % of a step of {self.step_s * 1e3:.1f} ms")
        whole = self.save_all_bytes / MIB
        shares = axes.secondary_xaxis(
            "top", functions=(lambda mib: 100 * mib / whole, lambda share: share * whole / 100)
        )
        shares.set_xlabel(f"% of the save-all peak of {format_bytes(self.save_all_bytes)}")
        axes.invert_xaxis()
        axes.margins(y=0.12)  # room for the crosses
        axes.grid(alpha=0.3)
        axes.legend()
        save(figure, path)

    def _draw(self, axes: Any, technique: Technique, colour: str, marker: str, height: float, zorder: float) -> None:
        """Draws one technique; what it does not reach are crosses at this share of the picture's height."""
        rows = self.line(technique)
        reached = [row for row in rows if row.added_s is not None]
        missed = [row.budget_bytes / MIB for row in rows if row.added_s is None]
        budgets = [row.budget_bytes / MIB for row in reached]
        added, bounds = (
            [100 * (seconds or 0.0) / self.step_s for seconds in line]
            for line in ([row.added_s for row in reached], [row.lower_bound_s for row in reached])
        )
        if reached:
            axes.plot(budgets, added, marker=marker, color=colour, label=technique.value, zorder=zorder)
            axes.plot(budgets, bounds, linestyle=":", color=colour, zorder=zorder)
        axes.plot(missed, [height] * len(missed), "x", color=colour, transform=axes.get_xaxis_transform())

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            title="Added time per step by budget",
            caption=f"save-all step: {format_bytes(self.save_all_bytes)}, {_ms(self.step_s)}; "
            f"smallest known peak: {format_bytes(self.minimum_bytes)}",
        )
        lines = {t: {row.budget_bytes: row for row in self.line(t)} for t in Technique}
        for name in ("budget", "share", "predicted peak"):
            table.add_column(name, justify="right")
        shown = [t for t in Technique if lines[t]]
        for name in (*(t.value for t in shown), "lower bound", "saved by 1 MiB more"):
            table.add_column(name, justify="right")
        table.add_column("status")
        for budget_bytes in self.budgets:
            best = lines[Technique.HYBRID][budget_bytes]
            table.add_row(
                format_bytes(budget_bytes),
                f"{budget_bytes / self.save_all_bytes:.0%}",
                "-" if best.peak_bytes is None else format_bytes(best.peak_bytes),
                *(_ms(lines[t][budget_bytes].added_s) for t in shown),
                "-" if best.lower_bound_s is None else _ms(best.lower_bound_s),
                "-" if best.saved_s_per_mib is None else f"{best.saved_s_per_mib * 1e3:.2f} ms",
                best.status,
            )
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def _ms(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds * 1e3:.1f} ms"


def frontier(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budgets: Iterable[Budget] | None = None,
    loss_args: tuple[Any, ...] = (),
    solver: str = "mps",
    **options: Any,
) -> Frontier:
    """Plans each budget by recomputing only, by compressing only, and by both.

    Args:
        model: as for ``fxhybrid.compile``.
        example_inputs: as for ``fxhybrid.compile``.
        budgets: bytes, text or shares; ``None`` is 12 even steps from the smallest known peak to the save-all peak.
        loss_args: example arguments of ``loss_fn``.
        solver: of the hybrid line; ``"ilp"`` takes some seconds for each budget. The other two lines are
            always the heuristic's.
        options: others of ``fxhybrid.compile``.

    Raises:
        InvalidArgument: a parameter cannot be used.
        CaptureError: the model cannot be traced into one graph.
    """
    checked = None if budgets is None else [check_size(budget) for budget in budgets]
    if checked is not None and not checked:
        raise InvalidArgument("budgets is empty; leave it out for 12 even steps")
    if "budget" in options:
        raise InvalidArgument("a frontier has many budgets: pass budgets=[...] instead of budget=")
    made = Options.checked(budget=1.0, solver=solver, **options)
    hybrid = wrap(model, made, None)
    plan_now(hybrid, example_inputs, loss_args)
    signature = one_graph(hybrid)
    state = replace(signature.state, plans=find_smallest_peak(signature.state.plans))
    return _frontier_of(state, _budget_bytes(state, checked))


def _budget_bytes(state: PlanningState, budgets: Sequence[int | float] | None) -> list[int]:
    top, bottom = state.save_all_bytes, state.minimum_bytes
    if budgets is None:
        steps = range(DEFAULT_COUNT)
        found = {top - (top - bottom) * i // (DEFAULT_COUNT - 1) for i in steps}
    else:
        found = {b if isinstance(b, int) else int(b * top) for b in budgets}
    return sorted(found, reverse=True)


def _frontier_of(state: PlanningState, budgets: Sequence[int]) -> Frontier:
    alone = list(state.plans.alone)
    for budget_bytes in budgets:
        alone = [polish_for(known, budget_bytes) for known in alone]
        chosen = [known.cheapest(budget_bytes) for known in alone]
        plans = (*state.plans.plans, *(plan for plan in chosen if plan))
        # lets a solver that was asked for add its plan
        state = extend(replace(state, plans=replace(state.plans, plans=plans)), budget_bytes)
    # without compression, recomputing is all there is
    known_by = dict(zip(Technique, [state.plans, *(alone or [state.plans])], strict=False))
    # only now, so that plans found for one budget serve the others, too; the largest first: its bound holds below it
    rows = []
    for budget_bytes in budgets:
        for technique in known_by:
            known_by[technique], row = _row(known_by[technique], technique, budget_bytes)
            rows.append(row)
    return Frontier(
        tuple(rows),
        state.save_all_bytes,
        known_by[Technique.HYBRID].smallest.peak_bytes,
        state.prepared.problem.step_s,
        state.prepared.profile.device,
        model_name(state),
    )


def _row(known: KnownPlans, technique: Technique, budget_bytes: int) -> tuple[KnownPlans, FrontierRow]:
    known = ensure(known, budget_bytes)
    if known.cheapest(budget_bytes) is None:
        return known, FrontierRow(budget_bytes, technique, known.unmet(budget_bytes).value)
    known, bound = prove_bound(known, budget_bytes)
    plan = known.cheapest(budget_bytes)
    assert plan is not None
    figures = plan.point.peak_bytes, plan.point.overhead_s, plan.lower_bound_s
    return known, FrontierRow(
        budget_bytes, technique, plan.status.value, *figures, saved_s_per_mib=bound.saved_s_per_byte * MIB
    )
