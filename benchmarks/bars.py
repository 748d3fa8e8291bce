"""The bars that the suite has to clear, each judged from the records of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.table import Table

from benchmarks.common import Record

REACH = {"mobilenetv2": 0.30, "bert": 0.45, "resnet50": 0.55, "vit": 0.40, "gpt2": 0.40}
NOT_TIMED = ("gru",)
MEAN_RATIO, EACH_RATIO = 1.10, 1.25
PREDICTED_EACH, PREDICTED_MEDIAN = 0.03, 0.015
SLACK = 0.005
COMPILE_S, SET_BUDGET_S = 60.0, 1.0
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Bar:
    """One bar: what is asked, what was found, and whether that is enough (None: nothing was measured)."""

    name: str
    asked: str
    found: str
    met: bool | None


def judge(records: Sequence[Record]) -> list[Bar]:
    """Every bar that these records speak to, and the ones they leave open."""
    good = [r for r in records if "error" not in r]
    failed = sorted({f"{r['model']}/{r['part']}" for r in records if "error" in r})
    bars = [
        *_budget_bars(_of(good, "budget")),
        _exact_bar(_of(good, "exact")),
        *_monotone_bars(_of(good, "monotone")),
        *_reach_bars(_of(good, "reach")),
        *_cheap_bars(_of(good, "cheap")),
        *_technique_bars(_of(good, "techniques")),
        bar_of(
            "compile",
            f"first compile <= {COMPILE_S:.0f} s each",
            {r["model"]: r["compile_s"] for r in good if math.isfinite(r.get("compile_s", math.nan))},
            COMPILE_S,
            "{:.1f} s",
        ),
    ]
    if failed:
        bars.append(Bar("parts that failed", "none", ", ".join(failed), False))
    return bars


def bars_table(bars: Iterable[Bar]) -> Table:
    """One row per bar."""
    table = Table(title="What it must show")
    for name in ("bar", "asked", "found", "met"):
        table.add_column(name)
    words = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "not measured"}
    for bar in bars:
        table.add_row(bar.name, bar.asked, bar.found, words[bar.met])
    return table


def _of(records: Sequence[Record], part: str) -> list[Record]:
    return [r for r in records if r["part"] == part]


def bar_of(name: str, asked: str, values: dict[str, float], limit: float, form: str) -> Bar:
    """A bar on the largest of ``values``; names those over it."""
    if not values:
        return Bar(name, asked, "", None)
    worst = max(values, key=lambda key: values[key])
    over = [f"{key} {form.format(value)}" for key, value in values.items() if value > limit]
    found = ", ".join(over) if over else f"largest: {form.format(values[worst])} ({worst})"
    return Bar(name, asked, found, not over)


def _name(record: Record) -> str:
    return f"{record['model']} at {record['share']}"


def _budget_bars(records: list[Record]) -> list[Bar]:
    over = {_name(r): r["measured_bytes"] / r["budget_bytes"] for r in records}
    off = {_name(r): abs(r["predicted_bytes"] / r["measured_bytes"] - 1) for r in records}
    errors = {_name(r): r["gradient_error"] / r["max_grad_error"] for r in records}
    middle = {"all": statistics.median(off.values())} if off else {}
    return [
        bar_of("budget kept", "measured / budget <= 1, ten steps", over, 1.0, "{:.4f}"),
        bar_of("predicted, each", f"within {PREDICTED_EACH:.1%} of measured", off, PREDICTED_EACH, "{:.2%}"),
        bar_of("predicted, median", f"within {PREDICTED_MEDIAN:.1%}", middle, PREDICTED_MEDIAN, "{:.2%}"),
        bar_of("gradient error", "measured / max_grad_error <= 1", errors, 1.0, "{:.2f}"),
    ]


def _exact_bar(records: list[Record]) -> Bar:
    asked = "bit-equal to eager and within a tight budget, lossless and recompute only"
    if not records:
        return Bar("exact", asked, "", None)
    wrong = [
        f"{r['model']} {r['compression']}"
        for r in records
        if not r["same_bits"] or r["measured_bytes"] > r["budget_bytes"]
    ]
    return Bar("exact", asked, ", ".join(wrong) if wrong else f"all {len(records)} cases", not wrong)


def _monotone_bars(records: list[Record]) -> list[Bar]:
    rises, falls, moves = {}, {}, {}
    for record in records:
        points, model = record["points"], record["model"]
        measured = [p["measured_bytes"] for p in points]
        added = [p["added_s"] for p in points]
        rises[model] = max((b / a - 1 for a, b in pairwise(measured)), default=0.0)
        falls[model] = max((a - b for a, b in pairwise(added)), default=0.0) * 1e3
        moves[model] = max(p["set_budget_s"] for p in points)
    return [
        bar_of("monotone peak", f"never rises by more than {SLACK:.1%}", rises, SLACK, "{:.2%}"),
        bar_of("monotone added time", "never falls", falls, 0.0, "{:.2f} ms"),
        bar_of("set_budget", f"<= {SET_BUDGET_S:.0f} s, rewrite included", moves, SET_BUDGET_S, "{:.2f} s"),
    ]


def _reach_bars(records: list[Record]) -> list[Bar]:
    shares = {r["model"]: r["minimum_share"] for r in records}
    return [
        bar_of(
            f"reach {model}",
            f"<= {limit:.2f} of the unmodified peak",
            {model: shares[model]} if model in shares else {},
            limit,
            "{:.3f}",
        )
        for model, limit in REACH.items()
    ]


def _cheap_bars(records: list[Record]) -> list[Bar]:
    timed = [r for r in records if r["model"] not in NOT_TIMED]
    ratios = {r["model"]: r["ratio"] for r in timed}
    mean = {}
    if ratios:
        mean["all"] = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return [
        bar_of("cheap, mean", f"geometric mean <= {MEAN_RATIO:.2f} x eager", mean, MEAN_RATIO, "{:.3f}"),
        bar_of("cheap, each", f"<= {EACH_RATIO:.2f} x eager", ratios, EACH_RATIO, "{:.3f}"),
    ]


def _technique_bars(records: list[Record]) -> list[Bar]:
    bars = []
    for name in ("recompute", "compress"):
        reached = [r for r in records if r[f"{name}_s"] is not None]
        excess = {_name(r): (r["hybrid_s"] - r[f"{name}_s"]) * 1e3 for r in reached}
        bars.append(bar_of(f"hybrid against {name} only", "planned added time is not above", excess, 0.0, "+{:.2f} ms"))
    orders = {
        f"{_name(r)} {n}": r[f"{n}_order"] for r in records for n in ("recompute", "compress") if f"{n}_order" in r
    }
    bars.append(_order_bar(orders))
    return bars


def _order_bar(orders: dict[str, Record]) -> Bar:
    asked = f"sign test agrees where plans differ by 5 % of a step (p <= {SIGNIFICANT})"
    if not orders:
        return Bar("measured order", asked, "", None)
    against = [name for name, order in orders.items() if order.get("p_value", 1.0) > SIGNIFICANT]
    found = ", ".join(against) if against else f"all {len(orders)} cases"
    return Bar("measured order", asked, found, not against)
