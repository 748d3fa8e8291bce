"""Gradient errors of single parts as errors of the whole step: measured on its batch, some parts at a time.

What calibration says of a part is relative to the gradients of that part. In the whole step these are a share of all
gradients, and the part's errors travel on into those of earlier parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from fxhybrid.ir.plan import Action
from fxhybrid.ir.problem import Problem, Tensor
from fxhybrid.ir.sequence import PartSequence
from fxhybrid.solvers.base import plan_error

MOST_RUNS = 6  # of the step; parts that follow each other share one where there are more
LEAST_SCALE = 0.02  # errors of one batch may be small by chance

PartActions = tuple[dict[int, Action], ...]
Measure = Callable[[PartActions], float]


def measured_scales(sequence: PartSequence, actions: PartActions, measure: Measure) -> list[float]:
    """Returns for each part by how much its errors in the whole step differ from those of the part by itself.

    Args:
        sequence: with the errors of parts by themselves.
        actions: of a plan with lossy codecs.
        measure: runs a plan on the batch of the trial, and returns its gradient error.
    """
    alone = [plan_error(part.problem, chosen) for part, chosen in zip(sequence.parts, actions, strict=True)]
    lossy = [k for k, error in enumerate(alone) if error > 0]
    n_runs = min(len(lossy), MOST_RUNS)
    scales = [1.0] * len(alone)
    for run in range(n_runs):
        together = lossy[run * len(lossy) // n_runs : (run + 1) * len(lossy) // n_runs]
        measured = measure(tuple(chosen if k in together else {} for k, chosen in enumerate(actions)))
        scale = max(measured / math.hypot(*(alone[k] for k in together)), LEAST_SCALE)
        for k in together:
            scales[k] = scale
    return scales


def with_scaled_errors(sequence: PartSequence, scales: Sequence[float]) -> PartSequence:
    """Returns the sequence with the errors of each part scaled."""
    pairs = zip(sequence.parts, scales, strict=True)
    return replace(sequence, parts=tuple(replace(p, problem=_scaled(p.problem, scale)) for p, scale in pairs))


def _scaled(problem: Problem, scale: float) -> Problem:
    def scaled(tensor: Tensor) -> Tensor:
        return replace(tensor, codecs=tuple(replace(codec, error=codec.error * scale) for codec in tensor.codecs))

    return problem if scale == 1 else replace(problem, tensors=tuple(map(scaled, problem.tensors)))
