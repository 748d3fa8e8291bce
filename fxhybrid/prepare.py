"""Prepare: the stages before solving, capture -> canonicalize -> profile -> problem, and those after it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from fxhybrid.budget import optimizer_bytes, storage_bytes
from fxhybrid.capture import Capture, capture
from fxhybrid.gradient_error import DEFAULT_GROUP_ERROR, ErrorTable, error_table, lossy_groups
from fxhybrid.graph import JointGraph
from fxhybrid.options import Options
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.choices import codec_choices
from fxhybrid.passes.fingerprint import fingerprint
from fxhybrid.passes.layout import Layout, layout_of
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.passes.to_problem import CodecChoices, calls_of, problem_of
from fxhybrid.plan import Actions
from fxhybrid.problem import Problem
from fxhybrid.profile import Profile, profile_calls
from fxhybrid.schedule import lower
from fxhybrid.step import Step, StepCall


@dataclass(frozen=True, eq=False)
class Prepared:
    """A captured signature up to the planning problem."""

    capture: Capture
    joint: JointGraph
    layout: Layout
    profile: Profile
    choices: CodecChoices
    problem: Problem
    fingerprint: str

    def with_errors(self, errors: ErrorTable) -> Prepared:
        """The same with other gradient errors."""
        resident = self.problem.resident_bytes
        problem = problem_of(self.joint, self.layout, self.profile, self.choices, errors, resident)
        return dataclasses.replace(self, problem=problem)


def prepare(step: Step, call: StepCall, options: Options) -> Prepared:
    """Captures a step and measures its operators; runs neither the model nor its backward pass."""
    captured = capture(step, tuple(call))
    joint = canonicalize(captured.joint)
    layout = layout_of(joint)
    lossy = options.compression == "auto" and options.max_grad_error > 0
    choices = codec_choices(layout, lossy=lossy, lossless=options.compression != "off")
    profile = profile_calls(calls_of(layout, choices))
    errors = error_table(lossy_groups(layout, choices), choices, lambda _: DEFAULT_GROUP_ERROR)
    resident = _resident_bytes(step, call, options)
    problem = problem_of(joint, layout, profile, choices, errors, resident)
    return Prepared(captured, joint, layout, profile, choices, problem, fingerprint(joint))


def _resident_bytes(step: Step, call: StepCall, options: Options) -> int:
    tensors: list[Tensor] = [*step.parameters(), *step.buffers(), *call.tensors]
    return storage_bytes(tensors) + optimizer_bytes(options.optimizer) + options.reserve_bytes


def build_graphs(prepared: Prepared, actions: Actions) -> tuple[JointGraph, SplitGraphs]:
    """The rewritten joint graph of ``actions`` and its halves."""
    joint = rewrite(prepared.joint, prepared.layout, lower(prepared.problem, actions))
    return joint, split(joint)
