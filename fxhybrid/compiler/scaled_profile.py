"""Costs of a step at new sizes from those that were measured at others.

Seconds grow with the work: operations of matrix products and convolutions, bytes of everything else. Bytes that an
operator takes beyond its results follow no such rule, so they are measured again wherever there may be any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

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
        sizes = zip(calls_of(self.layout, self.choices), self.results, strict=True)
        return [_SizedCall(call, result, made_bytes) for call, (result, made_bytes) in sizes]

    @property
    def results(self) -> Iterable[tuple[Any, int]]:
        """Result and bytes of each call."""
        return _results(self)

    @cached_property
    def names(self) -> list[tuple[str, Any]]:
        """Names and targets of all operators."""
        return [(op.name, op.node.target) for op in self.layout.forward + self.layout.backward]


class Work(NamedTuple):
    """Holds what a call computes and moves.

    Attributes:
        flops: operations of a matrix product or convolution; 0 for others.
        moved_bytes: bytes of inputs and results.
        made_bytes: what it leaves allocated.
    """

    flops: int
    moved_bytes: int
    made_bytes: int

    @classmethod
    def of(cls, call: Call, result: Any, made_bytes: int) -> Work:
        """Counts the work of a call, from its fake result where there is one."""
        moved_bytes = count_bytes((call.args, dict(call.kwargs))) + made_bytes
        return cls(count_flops(call.target, call.args, result), moved_bytes, made_bytes)


@dataclass(frozen=True, eq=False)
class _SizedCall:
    """Holds a call, its fake result where there is one, and the bytes that it leaves allocated."""

    call: Call
    result: Any
    made_bytes: int

    @cached_property
    def work(self) -> Work:
        """What the call computes and moves."""
        return Work.of(self.call, self.result, self.made_bytes)


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
        scaled = scaled_cost(cost, old.work, new.work, new.call.target)
        if scaled.alloc_peak_bytes < 0:
            open_calls[key] = new.call, scaled.seconds
        else:
            costs[key] = scaled
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


def scaled_cost(cost: OpCost, old: Work, new: Work, target: Any) -> OpCost:
    """Returns the cost of a call that has other work now; its bytes are -1 where they are to be measured."""
    before, after = (old.flops, new.flops) if old.flops and new.flops else (old.moved_bytes, new.moved_bytes)
    seconds = cost.seconds * (after / before if before else 1.0)
    return OpCost(seconds, -1 if _has_workspace(cost, old, new, target) else new.made_bytes)


def _has_workspace(cost: OpCost, old: Work, new: Work, target: Any) -> bool:
    """Tells whether the call may take bytes beyond its results.

    What took none at some size takes none at a smaller one; elementwise kernels take none at larger ones either.
    """
    if cost.estimated or cost.alloc_peak_bytes > old.made_bytes:
        return True
    tags = getattr(target, "tags", ())
    return new.moved_bytes > old.moved_bytes and torch.Tag.pointwise not in tags
