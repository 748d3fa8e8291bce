"""Calibration: what lossy choices do to the gradient, by running them on the example batch.

Steps at 4 bits, a few for each group of lossy candidates, tell the error of each tensor and how it spreads over its
channels. From that the widths of the channel-wise codecs follow. Then one step for each group and each other kind of
codec says by how much the prediction from 4 bits is off there. Tensors that are offered no 4 bits begin with 8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fxhybrid.accuracy.attribution import neighbours, tensor_errors
from fxhybrid.accuracy.channel_widths import channelwise_choices
from fxhybrid.accuracy.compression_trial import LossyStep
from fxhybrid.accuracy.verifier import Reference
from fxhybrid.codecs import NOISE_AT_4_BITS, coarsest_lossy, codec_kind, get_codec
from fxhybrid.codecs.channelwise import Channelwise
from fxhybrid.codecs.widths import STEP_ERROR
from fxhybrid.console import tracked
from fxhybrid.ir.plan import Actions
from fxhybrid.passes.build_problem import CodecChoices
from fxhybrid.passes.error_prior import ErrorTable, lossy_groups
from fxhybrid.pipeline import Prepared, build_graphs

PART, MOST_PARTS = 8, 5  # tensors in a step where errors travel, unless that made more steps
MEASURED_ZERO = 1e-6  # a lossy codec never counts as exact, even if one batch does not show it


@dataclass(frozen=True)
class ErrorPair:
    """Pairs a predicted and a measured gradient error, of the same lossy tensors.

    Attributes:
        what: the operators that read the tensors, or which plan it is.
        codec: their kind of codec; empty for a plan.
        predicted: from the same tensors at 4 bits, or the L2 norm over a plan.
        measured: on the example batch.
    """

    what: str
    codec: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Calibration:
    """Holds codecs to offer, with the error of each.

    Attributes:
        choices: the given ones and channel-wise codecs.
        errors: of each (storage, lossy codec).
        pairs: groups of tensors whose error was both predicted and measured.
    """

    choices: CodecChoices
    errors: ErrorTable
    pairs: tuple[ErrorPair, ...]


def measured_error(prepared: Prepared, reference: Reference, actions: Actions) -> float:
    """Runs ``actions`` on the reference's batch, and returns the relative gradient error."""
    return reference.gradient_error(build_graphs(prepared, actions))


def calibrate(prepared: Prepared, reference: Reference) -> Calibration:
    """Measures all groups on the reference's batch."""
    groups = _groups_at_4_bits(prepared, LossyStep(prepared, reference))
    offered = channelwise_choices(prepared, [group.channels for group in groups.values()])
    choices = {t: _sorted(prepared, t, [*specs, *offered.get(t, [])]) for t, specs in prepared.choices.items()}
    runs = [run for name, group in groups.items() for run in group.runs_of_others(name, choices)]
    for run in tracked(runs, "measuring gradient errors"):
        run()
    errors = {key: max(error, 0.0) ** 0.5 for group in groups.values() for key, error in group.errors.items()}
    errors = {key: max(error, MEASURED_ZERO) for key, error in errors.items() if math.isfinite(error)}
    measured = {t: tuple(s for s in specs if get_codec(s).lossless or (t, s) in errors) for t, specs in choices.items()}
    pairs = tuple(pair for group in groups.values() for pair in group.pairs)
    return Calibration(measured, errors, pairs)


def channels_at_4_bits(prepared: Prepared, step: LossyStep) -> dict[str, dict[int, Tensor]]:
    """Measures the squared error of each tensor's rows of channels at 4 bits, by groups of tensors."""
    return {name: group.channels for name, group in _groups_at_4_bits(prepared, step).items()}


def _groups_at_4_bits(prepared: Prepared, step: LossyStep) -> dict[str, _GroupRuns]:
    found = lossy_groups(prepared.layout, prepared.choices)
    groups = {", ".join(sorted(group)): _GroupRuns(prepared, step, members) for group, members in found.items()}
    runs = [run for group in groups.values() for run in group.coarse_runs()]
    for run in tracked(runs, "measuring gradient errors"):
        run()
    return groups


def _sorted(prepared: Prepared, storage: int, specs: Iterable[str]) -> tuple[str, ...]:
    """Sorts codecs by size, the largest first."""
    meta = prepared.meta(storage)
    return tuple(sorted(dict.fromkeys(specs), key=lambda spec: -sum(get_codec(spec).encoded_bytes(meta))))


class _GroupRuns:
    """Makes the measured steps of one group of lossy candidates.

    Attributes:
        at_4_bits: squared error of each tensor; predicted for those that are offered no 4 bits.
        channels: the same of its rows of channels, where they were seen.
        errors: squared error of each (storage, lossy codec).
        pairs: what was both predicted and measured.
    """

    def __init__(self, prepared: Prepared, step: LossyStep, members: Iterable[int]) -> None:
        self.prepared, self.step = prepared, step
        self.members = sorted(members)
        self.near = neighbours(prepared.joint, prepared.layout, self.members)
        self.at_4_bits: dict[int, float] = {}
        self.channels: dict[int, Tensor] = {}
        self.errors: dict[tuple[int, str], float] = {}
        self.pairs: list[ErrorPair] = []

    def coarse_runs(self) -> list[Callable[[], None]]:
        """Returns one step for all with the coarsest codec that they are offered, or for each part of similar depth."""
        coarsest = coarsest_lossy(self.prepared.choices, self.members)
        by_noise: dict[float, dict[int, str]] = {}  # what the louder ones do would hide the others
        for t, spec in sorted(coarsest.items()):
            by_noise.setdefault(get_codec(spec).noise, {})[t] = spec
        return [partial(self._run_coarse, part) for specs in by_noise.values() for part in self._parts(specs)]

    def _parts(self, specs: Mapping[int, str]) -> list[dict[int, str]]:
        """Splits tensors into several parts where errors travel."""
        travels = any(self.near[t].travels for t in specs)
        n_parts = min(MOST_PARTS, -(-len(specs) // PART)) if travels else 1
        ends = [len(specs) * part // n_parts for part in range(n_parts + 1)]
        return [dict(itertools.islice(specs.items(), *span)) for span in itertools.pairwise(ends)]

    def _run_coarse(self, specs: Mapping[int, str]) -> None:
        near = {t: self.near[t] for t in specs}
        by_parameter = self.step.differences(specs, near)
        for t, error in tensor_errors(by_parameter, near).items():
            noise = get_codec(specs[t]).noise
            self.errors[t, specs[t]], self.at_4_bits[t] = error, error / noise**2
            seen = self.step.watch.channel_errors(t, by_parameter, error)
            if seen is not None and noise == NOISE_AT_4_BITS:
                self.channels[t] = seen

    def runs_of_others(self, name: str, choices: CodecChoices) -> list[Callable[[], None]]:
        """Returns one step for each other kind of codec."""
        kinds = sorted({codec_kind(spec) for t in self.members for spec in choices[t]})
        rounds = ((kind, specs) for kind in kinds for specs in self._of_kind(kind, choices))
        return [partial(self._run_other, name, kind, specs) for kind, specs in rounds]

    def _run_other(self, name: str, kind: str, specs: Mapping[int, str]) -> None:
        """Runs all tensors with codecs of one kind: tells by how much the prediction from 4 bits is off."""
        each = {t: predicted_error(spec, self.at_4_bits[t], self.channels.get(t)) for t, spec in specs.items()}
        predicted, measured = sum(each.values()), sum(self.step.differences(specs).values())
        self.pairs.append(ErrorPair(name, kind, predicted**0.5, measured**0.5))
        for t, error in each.items():
            self.errors[t, specs[t]] = error * measured / predicted if predicted else measured / len(each)

    def _of_kind(self, kind: str, choices: CodecChoices) -> list[dict[int, str]]:
        """Finds lossy codecs of one kind not run yet: one for each member, then a second for each that has two."""
        found = {
            t: [
                s
                for s in choices[t]
                if codec_kind(s) == kind and not get_codec(s).lossless and (t, s) not in self.errors
            ]
            for t in self.members
        }
        rounds = range(max(map(len, found.values()), default=0))
        return [{t: specs[n] for t, specs in found.items() if n < len(specs)} for n in rounds]


def predicted_error(spec: str, at_4_bits: float, channels: Tensor | None) -> float:
    """Predicts the squared error of a codec from that of 4 bits a row, whole or by rows of channels."""
    codec = get_codec(spec)
    if isinstance(codec, Channelwise) and channels is not None:
        return float(
            sum(225 * STEP_ERROR[w] * e for w, e in zip(codec.widths.tolist(), channels.tolist(), strict=True))
        )
    return at_4_bits * codec.noise**2
