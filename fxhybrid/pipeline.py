"""Prepare: the stages before solving, capture -> canonicalize -> profile -> problem, and those after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fxhybrid.capture.capture import Capture, capture
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.ir.plan import Actions, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import lower
from fxhybrid.options import Options
from fxhybrid.passes.build_problem import CodecChoices, calls_of, problem_of, with_codec_options
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.codec_choices import codec_choices, codec_refusals
from fxhybrid.passes.error_prior import DEFAULT_GROUP_ERROR, ErrorTable, error_table, lossy_groups
from fxhybrid.passes.fingerprint import fingerprint
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.passes.storages import Layout, layout_of
from fxhybrid.profiling.op_profiler import Profile, profile_calls
from fxhybrid.profiling.state_bytes import optimizer_bytes, storage_bytes


@dataclass(frozen=True, eq=False)
class Prepared:
    """Holds a captured signature up to the planning problem.

    ``refusals`` holds, by name, the rule by which a tensor was offered no codec from the start.
    """

    capture: Capture
    joint: JointGraph
    layout: Layout
    profile: Profile
    choices: CodecChoices
    refusals: Mapping[str, str]
    problem: Problem
    fingerprint: str

    def meta(self, storage: int) -> TensorMeta:
        """Returns shape, strides and type of a storage that some node reads whole."""
        base = self.layout.storages[storage].base
        assert base is not None, "codecs are offered only for storages that are read"
        return TensorMeta.of(base.meta["val"])

    @property
    def compression_refusals(self) -> Mapping[str, str]:
        """Why tensors of the forward pass are offered no codec, in words, by name."""
        dropped = (self.layout.storages[t].name for t, specs in self.choices.items() if not specs)
        return {**self.refusals, **dict.fromkeys(dropped, "calibration found no codec with a finite gradient error")}

    @cached_property
    def save_all_graphs(self) -> SplitGraphs:
        """The halves of the save-all step."""
        return build_graphs(self, {})[1]

    def with_choices(self, choices: CodecChoices) -> Prepared:
        """Returns the same with other codecs offered, their times measured; ``with_errors`` makes a problem of it."""
        return dataclasses.replace(self, choices=choices, profile=profile_calls(calls_of(self.layout, choices)))

    def offering(self, actions: Actions) -> Prepared:
        """Returns the same with a transferred plan's channel-wise codecs offered too: widths differ from run to run."""
        choices, errors = dict(self.choices), dict[tuple[int, str], float]()
        for t, tensor in enumerate(self.problem.tensors):
            lossy = [option for option in tensor.codecs if not option.lossless]
            errors |= {(t, option.codec): option.error for option in lossy}
            action = actions.get(t)
            spec = action.codec if isinstance(action, Compress) and action.codec.startswith("channelwise:") else None
            if spec and lossy and spec not in choices[t] and get_codec(spec).supports(self.meta(t)):
                choices[t] = (*choices[t], spec)
                errors[t, spec] = max(o.error / get_codec(o.codec).noise for o in lossy) * get_codec(spec).noise
        return self if choices == self.choices else self.with_choices(choices).with_errors(errors)

    def with_errors(self, errors: ErrorTable) -> Prepared:
        """Returns the same with other gradient errors."""
        problem = with_codec_options(self.problem, self.layout, self.profile, self.choices, errors)
        return dataclasses.replace(self, problem=problem)


def prepare(step: Step, call: StepCall, options: Options) -> Prepared:
    """Captures a step and measures its operators; runs neither the model nor its backward pass."""
    lossy = options.compression == "auto" and options.max_grad_error > 0
    lossless = options.compression != "off"
    captured = capture(step, tuple(call), exact=not lossy)
    joint = canonicalize(captured.joint)
    layout = layout_of(joint)
    choices = codec_choices(layout, lossy=lossy, lossless=lossless)
    refusals = codec_refusals(layout, lossy=lossy, lossless=lossless)
    profile = profile_calls(calls_of(layout, choices))
    errors = error_table(lossy_groups(layout, choices), choices, lambda _: DEFAULT_GROUP_ERROR)
    resident = _resident_bytes(step, call, options)
    problem = problem_of(joint, layout, profile, choices, errors, resident)
    return Prepared(captured, joint, layout, profile, choices, refusals, problem, fingerprint(joint))


def _resident_bytes(step: Step, call: StepCall, options: Options) -> int:
    tensors: list[Tensor] = [*step.parameters(), *step.buffers(), *call.tensors]
    return storage_bytes(tensors) + optimizer_bytes(options.optimizer) + options.reserve_bytes


def build_graphs(prepared: Prepared, actions: Actions) -> tuple[JointGraph, SplitGraphs]:
    """Builds the rewritten joint graph of ``actions`` and its halves."""
    joint = rewrite(prepared.joint, prepared.layout, lower(prepared.problem, actions))
    return joint, split(joint)
