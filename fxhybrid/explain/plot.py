"""Pictures of a plan: memory over the step, and all known plans by peak and added time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxhybrid.explain.memory_timeline import MemoryTimeline
from fxhybrid.optional_imports import require
from fxhybrid.units import format_bytes

MIB = 1 << 20
# Light and dark in turn, so that neighbours differ in grey, too.
COLOURS = (
    "#3b3b3b", "#c9c9c9", "#7a5195", "#e3c1e8", "#a65628", "#ffd8a8", "#1f4e79", "#a9d3f5",
    "#2e7d32", "#c5e8b7", "#8c1c2b", "#f7b6b2", "#00606b", "#a8e6e6", "#8a6d00", "#fff3b0", "#ad1457", "#f8bbd0",
)  # fmt: skip


def pyplot() -> Any:
    """Imports matplotlib without a display.

    Raises:
        InvalidArgument: matplotlib is not installed.
    """
    require("matplotlib", "a plot").use("Agg")
    return require("matplotlib.pyplot", "a plot")


def memory_figure(unmodified: MemoryTimeline, planned: MemoryTimeline, budget_bytes: int, title: str) -> Any:
    """Draws memory over the unmodified and over the planned step, stacked by kind; the caller closes the figure.

    Raises:
        InvalidArgument: matplotlib is not installed.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True, layout="constrained")
    colours = dict(zip(planned.kinds, COLOURS * 2, strict=False))
    top = max(unmodified.peak_bytes, planned.peak_bytes, budget_bytes) / MIB
    for axes, timeline, name in zip(panels, (unmodified, planned), ("unmodified", "planned"), strict=True):
        _draw_stack(axes, timeline, colours)
        _mark_peak(axes, timeline, top)
        axes.axhline(budget_bytes / MIB, color="black", linestyle="--", linewidth=1)
        axes.axvline(timeline.forward_s * 1e3, color="black", linewidth=0.5)
        axes.set_title(f"{name}: peak {format_bytes(timeline.peak_bytes)}")
        axes.set_ylim(0, top * 1.15)
        axes.margins(x=0)
    panels[0].set_ylabel("memory, MiB")
    panels[1].annotate(f"budget {format_bytes(budget_bytes)}", (0.01, budget_bytes / MIB), (0, 3),
                       xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    handles, names = panels[1].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.supxlabel("predicted time in the step, ms (line: end of the forward pass)", fontsize="medium")
    return figure


def _draw_stack(axes: Any, timeline: MemoryTimeline, colours: dict[str, str]) -> None:
    starts = np.concatenate(([0.0], timeline.end_s)) * 1e3
    heights = [np.append(timeline.bytes_of[kind], timeline.bytes_of[kind][-1:]) / MIB for kind in timeline.kinds]
    axes.stackplot(
        starts, heights, labels=timeline.kinds, colors=[colours[kind] for kind in timeline.kinds], step="post"
    )


def _mark_peak(axes: Any, timeline: MemoryTimeline, top: float) -> None:
    at_s = timeline.end_s[timeline.peak_at - 1] if timeline.peak_at else 0.0
    height = timeline.peak_bytes / MIB
    axes.annotate(
        f"peak {format_bytes(timeline.peak_bytes)}",
        (at_s * 1e3, height),
        (at_s * 1e3, height + 0.06 * top),
        ha="left" if at_s < timeline.end_s[-1] / 2 else "right",
        arrowprops={"arrowstyle": "->"},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},  # over the line between the passes
    )


def plans_figure(
    points: Sequence[tuple[int, float]], chosen: tuple[int, float], budget_bytes: int, step_s: float, title: str
) -> Any:
    """Draws the known plans that no other one beats, and the one that runs; the caller closes the figure.

    Args:
        points: peak in bytes and added seconds of each plan.
        chosen: the same of the plan that runs.
        budget_bytes: the budget.
        step_s: seconds of the unmodified step.
        title: of the picture.

    Raises:
        InvalidArgument: matplotlib is not installed.
    """
    figure, axes = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    peaks, added = zip(*_undominated(points), strict=True)
    axes.step([p / MIB for p in peaks], [100 * s / step_s for s in added], where="post", marker=".", color="#1f4e79",
              label="known plans")  # fmt: skip
    axes.plot(
        chosen[0] / MIB, 100 * chosen[1] / step_s, "*", markersize=14, color="#a65628", label="the plan that runs"
    )
    axes.axvline(budget_bytes / MIB, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set_xlabel("predicted peak, MiB")
    axes.set_ylabel(f"added time, % of a step of {step_s * 1e3:.1f} ms")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title)
    return figure


def _undominated(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns the points, by peak, that add less than all of a smaller peak."""
    kept: list[tuple[int, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def save(figure: Any, path: str | Path) -> None:
    """Writes a figure, in the format that the suffix says, and closes it."""
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
