"""The plans that a search has come by, with what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from fxhybrid.solvers.footprint import Footprint


@dataclass(frozen=True)
class Point:
    """A measured state; its codes as bytes."""

    codes: bytes
    mark: Footprint


def by_peak(point: Point) -> tuple[int, float]:
    """Sorts points by their peaks."""
    return point.mark.peak_bytes, point.mark.added_s


def undominated(points: list[Point]) -> list[Point]:
    """The points that no other one beats, the cheapest first; the first of ``points`` is the start."""
    best: list[Point] = []
    for point in sorted(points[1:], key=lambda p: (p.mark.added_s, p.mark.peak_bytes, p.mark.error2)):
        if point.mark.peak_bytes < min(points[0].mark.peak_bytes, best[-1].mark.peak_bytes if best else 1 << 62):
            best.append(point)
    return best
