"""Costs of a step at new sizes from those that were measured at others.

Seconds grow with the work: operations of matrix products and convolutions, bytes of everything else. Bytes that an
operator takes beyond its results follow no such rule, so they are measured again wherever there may be any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.passes.build_problem import CodecChoices, calls_of
from fxhybrid.passes.storages import Layout, fused_form
from fxhybrid.profiling.cost_cache import OpCost
from fxhybrid.profiling.cost_estimate import count_bytes, count_flops
from fxhybrid.profiling.op_profiler import Call, Profile, measure_alloc_peaks, profile_calls


@dataclass(frozen=True, eq=False)
class StepCalls:
    """Holds what a profile is made for: a layout, and the codecs offered to its storages."""

    layout: Layout
    choices: CodecChoices

    @cached_property
    def sized(self) -> Sequence[_SizedCall]:
        """Every call with what it makes."""
        sizes = zip(calls_of(self.layout, self.choices), _results(self), strict=True)
        return [_SizedCall(call, result, made_bytes) for call, (result, made_bytes) in sizes]

    @cached_property
    def names(self) -> list[tuple[str, Any]]:
        """Names and targets of all operators."""
        return [(op.name, op.node.target) for op in self.layout.forward + self.layout.backward]


@dataclass(frozen=True, eq=False)
class _SizedCall:
    """Holds a call, its fake result where there is one, and the bytes that it leaves allocated."""

    call: Call
    result: Any
    made_bytes: int

    @cached_property
    def flops(self) -> int:
        """Counts the operations of a matrix product or convolution; 0 for others."""
        return count_flops(self.call.target, self.call.args, self.result)

    @cached_property
    def moved_bytes(self) -> int:
        """Counts the bytes of inputs and results."""
        return count_bytes((self.call.args, dict(self.call.kwargs))) + self.made_bytes


def scaled_profile(measured: Profile, at: StepCalls, wanted: StepCalls) -> Profile:
    """Builds the profile of a step at new sizes.

    Args:
        measured: of the step ``at`` other sizes.
        at: what ``measured`` is of.
        wanted: the step at the new sizes, with as many codecs, in the same order, for the same storages. Where its
            operators are others, since a rewrite depends on sizes, all calls are measured.

    Raises:
        ProfileError: a call cannot be measured.
    """
    if at.names != wanted.names:
        return profile_calls(calls_of(wanted.layout, wanted.choices))
    costs: dict[str, OpCost] = {}
    open_calls: dict[str, tuple[Call, float]] = {}
    for old, new in zip(at.sized, wanted.sized, strict=True):
        cost, key = measured.cost(old.call), new.call.key
        if key == old.call.key:
            costs[key] = cost
            continue
        seconds = cost.seconds * _work_ratio(old, new)
        if _has_workspace(cost, old, new):
            open_calls[key] = new.call, seconds
        else:
            costs[key] = OpCost(seconds, new.made_bytes)
    peaks = measure_alloc_peaks(call for call, _ in open_calls.values())
    costs |= {key: OpCost(seconds, peaks[key]) for key, (_, seconds) in open_calls.items()}
    return Profile(measured.device, costs)


def _results(step: StepCalls) -> Iterable[tuple[Any, int]]:
    """Yields result and bytes of each call of ``calls_of``."""
    layout = step.layout
    for op in layout.forward + layout.backward:
        made = op.node.meta.get("val"), sum(layout.storages[t].size_bytes for t in op.outputs)
        yield made
        if fused_form(op.node):
            yield made
    for storage, specs in step.choices.items():
        base = layout.storages[storage].base
        assert base is not None, "codecs are offered only for storages that are read"
        meta = TensorMeta.of(base.meta["val"])
        for spec in specs:
            yield None, sum(get_codec(spec).profiled_as().encoded_bytes(meta))
            yield None, meta.nbytes


def _work_ratio(old: _SizedCall, new: _SizedCall) -> float:
    before, after = (old.flops, new.flops) if old.flops and new.flops else (old.moved_bytes, new.moved_bytes)
    return after / before if before else 1.0


def _has_workspace(cost: OpCost, old: _SizedCall, new: _SizedCall) -> bool:
    """Tells whether the call may take bytes beyond its results.

    What took none at some size takes none at a smaller one; elementwise kernels take none at larger ones either.
    """
    if cost.estimated or cost.alloc_peak_bytes > old.made_bytes:
        return True
    tags = getattr(new.call.target, "tags", ())
    return new.moved_bytes > old.moved_bytes and torch.Tag.pointwise not in tags
