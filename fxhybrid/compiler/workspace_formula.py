"""Bytes that a call takes beside its results at many sizes, by a formula that follows from those measured so far."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any

import torch

aten = torch.ops.aten

FITTED = 3  # sizes that a formula of the second degree follows from
CONFIRMED = 2  # further ones at which it has to give the very bytes that were measured
# Kernels of elements, rows or lines: they copy inputs, or keep numbers a line or a thread, whatever divides the sizes.
PLAIN = frozenset(
    [
        *(aten.embedding.default, aten.embedding_dense_backward.default),
        *(aten.native_dropout.default, aten.native_dropout_backward.default),
        *(aten.native_layer_norm.default, aten.native_layer_norm_backward.default),
        *(aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default),
        *(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default),
        *(aten.sum.dim_IntList, aten.mean.dim, aten.cumsum.default),
        *(aten.nll_loss_forward.default, aten.nll_loss_backward.default),
    ]
)


def follows_formula(target: Any) -> bool:
    """Whether an operator's bytes may follow a formula: libraries of matrix products choose kernels by divisors."""
    return target in PLAIN or torch.Tag.pointwise in getattr(target, "tags", ())


class WorkspaceFormula:
    """Holds what a call allocated at some sizes, and gives what it allocates at sizes between these.

    What a plain kernel copies or keeps is a polynomial of at most the second degree in each size. A threshold at which
    threads take over is noticed if it lies between measured sizes, so bytes are given for sizes between these only.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line] = {}  # by the size that varies and all others, which stay

    def note(self, sizes: Mapping[str, int], n_bytes: int) -> None:
        """Adds what was measured at some sizes."""
        for line, size in _lines(sizes).items():
            self._lines.setdefault(line, _Line()).add(size, n_bytes)

    def at(self, sizes: Mapping[str, int]) -> int | None:
        """Returns the bytes at some sizes; None where they have to be measured."""
        known = ((self._lines.get(line), size) for line, size in _lines(sizes).items())
        found = (line.at(size) for line, size in known if line is not None)
        return next((n_bytes for n_bytes in found if n_bytes is not None), None)


def _lines(sizes: Mapping[str, int]) -> dict[Hashable, int]:
    """Returns each size by the symbols that have it and all others; inputs and labels often have the same length."""
    symbols: dict[int, list[str]] = {}
    for name in sorted(sizes):
        symbols.setdefault(sizes[name], []).append(name)
    return {
        (tuple(names), tuple(sorted(item for item in sizes.items() if item[1] != size))): size
        for size, names in symbols.items()
    }


class _Line:
    """Holds what a call allocated at several values of one size."""

    def __init__(self) -> None:
        self._points: dict[int, int] = {}
        self._fitted: list[tuple[int, int]] = []  # three points whose parabola all others confirm

    def add(self, size: int, n_bytes: int) -> None:
        self._points[size] = n_bytes
        points = sorted(self._points.items())
        fitted = [points[0], points[len(points) // 2], points[-1]]
        enough = len(points) >= FITTED + CONFIRMED
        self._fitted = fitted if enough and all(_parabola(fitted, at) == y for at, y in points) else []

    def at(self, size: int) -> int | None:
        if not self._fitted or not self._fitted[0][0] <= size <= self._fitted[-1][0]:
            return None
        found = _parabola(self._fitted, size)
        return int(found) if found.denominator == 1 else None


def _parabola(points: list[tuple[int, int]], at: int) -> Fraction:
    """Evaluates the polynomial through three points (Newton's form), exactly."""
    (a, at_a), (b, at_b), (c, at_c) = points
    slope, next_slope = Fraction(at_b - at_a, b - a), Fraction(at_c - at_b, c - b)
    return at_a + (at - a) * (slope + (at - b) * (next_slope - slope) / (c - a))
