"""A captured step in its canonical form, whatever backward pass is to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fxhybrid.capture.capture import Capture
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.output_structure import OutputStructure, tangents_of_outputs
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.channels_last import USUAL_LAYOUT, Crossing
from fxhybrid.passes.channels_last_choice import with_groups
from fxhybrid.passes.expected_backward import ExpectedBackward
from fxhybrid.passes.fingerprint import fingerprint
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.profiling.parameter_update import ParameterUpdates


@dataclass(frozen=True, eq=False)
class Traced:
    """Holds a captured signature in its canonical form, whatever backward pass is to come.

    Attributes:
        capture: what was captured.
        joint: the canonical joint graph, with the branches of all tangents.
        plain: the same with eager's layout everywhere.
        channels_last: numbers of the groups of operators of ``joint`` that run in channels_last instead.
        structure: where the graph's outputs are in what a call returns.
        resident_bytes: everything that is alive through the whole step.
        update_rise_bytes: how far memory rises while the optimizer steps; None without one, or where that is done in
            the backward pass.
        updates: what updates parameters in the backward pass; None where that comes after it.
        lossy: whether lossy codecs may be offered.
        lossless: the same of lossless ones.
        any_order: whether sums may be taken in another order than eager's.
        known_interface: that of ``joint``, where it is known without.
        crossing: images that come from other graphs in channels_last, or go to others so.
    """

    capture: Capture
    joint: JointGraph
    plain: JointGraph
    channels_last: tuple[int, ...]
    structure: OutputStructure
    resident_bytes: int
    update_rise_bytes: int | None
    updates: ParameterUpdates | None
    lossy: bool
    lossless: bool
    any_order: bool
    known_interface: StepInterface | None = None
    crossing: Crossing = USUAL_LAYOUT

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ``plain``."""
        return fingerprint(self.plain)

    @cached_property
    def interface(self) -> StepInterface:
        """What goes into ``joint`` and comes out."""
        return self.known_interface or StepInterface.of(self.joint)

    @cached_property
    def tangents(self) -> Mapping[int, int]:
        """By position of each output with a gradient, views and their bases included, the position of its tangent."""
        return tangents_of_outputs(self.capture.metadata)

    def in_layout(self, channels_last: tuple[int, ...], crossing: Crossing = USUAL_LAYOUT) -> Traced:
        """Returns the same with these groups of operators in channels_last, and images that cross to other graphs."""
        if (channels_last, crossing) == (self.channels_last, self.crossing):
            return self
        captured = self.capture.joint
        placeholders, tangents = captured.placeholders, captured.tangents
        coming = [
            *(placeholders[i] for i in crossing.inputs),
            *(tangents[self.tangents[i]] for i in crossing.outputs if i in self.tangents),
        ]
        laid_out = with_groups(captured, channels_last, coming, crossing.outputs)
        joint = self.plain if laid_out is captured else canonicalize(laid_out, reordered=True)
        return dataclasses.replace(
            self, joint=joint, channels_last=channels_last, crossing=crossing, known_interface=None
        )

    @property
    def n_outputs(self) -> int:
        """How many outputs the graph has, bases of views included."""
        metadata = self.capture.metadata
        return int(len(metadata.output_info) + metadata.num_intermediate_bases)

    def without(self, present: Iterable[int]) -> frozenset[int]:
        """Returns the positions of the tangents that are not among those."""
        return frozenset(self.tangents.values()).difference(present)

    def expected(self, without_gradient: Iterable[int], dropped: Iterable[int]) -> ExpectedBackward:
        """Returns the expected backward pass in which outputs at those positions get no gradient, or are dropped."""
        outputs = set(without_gradient)
        absent = frozenset(tangent for output, tangent in self.tangents.items() if output in outputs)
        return ExpectedBackward(absent, frozenset(dropped))

    def droppable(self, absent: frozenset[int]) -> frozenset[int]:
        """Returns the positions of the outputs without a gradient that a caller may drop before a backward pass."""
        without = (i for i in range(self.n_outputs) if self.tangents.get(i) is None or self.tangents[i] in absent)
        return frozenset(without) - self.structure.kept

    def weighed(self, absent: frozenset[int]) -> frozenset[int] | None:
        """Returns the positions, among the tensors that a call returns, of those with a gradient; None for all."""
        if not absent:
            return None
        present = {output for output, tangent in self.tangents.items() if tangent not in absent}
        return frozenset(j for j, output in enumerate(self.structure.leaves) if output in present)
