"""The signatures of a session: found for a call, derived from a symbolic capture, and dropped when too many.

The first call of a kind is captured as it is. A second one that differs in sizes is captured with these symbolic; all
others of the kind follow from that. Where a symbolic trace is not possible, or is not the static one at the sizes of
the first call, each shape is captured by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from weakref import WeakKeyDictionary

from fxhybrid.capture.capture import Capture
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.capture.symbolic import Dims, Sizes, SymbolicCapture, capture_symbolic
from fxhybrid.compiler.call_shape import CallShape, joined
from fxhybrid.compiler.observed_backward import ObservedBackward
from fxhybrid.compiler.planning_state import PlanningState
from fxhybrid.compiler.signature import Signature
from fxhybrid.compiler.size_family import SizeFamily
from fxhybrid.compiler.size_template import sized_step
from fxhybrid.errors import FxHybridError
from fxhybrid.passes.concretize import SymbolicGraph, concretize
from fxhybrid.passes.fingerprint import fingerprint

# Derived signatures are kept up to so many ops of their steps, and at least so many signatures. An op takes some KiB,
# and ten times that where graphs for one size alone are built.
KEPT_OPS, LEAST_KEPT = 10_000, 4
MOST_TRIES = 3  # symbolic captures of one kind of call, before every new shape is captured as it is


class SignatureCache:
    """Holds the signatures of a session.

    Attributes:
        signatures: one for each kind and size of call, the last called first.
        families: kinds of calls that are captured with symbolic sizes.
    """

    def __init__(self) -> None:
        self.signatures: list[Signature] = []
        self.families: list[SizeFamily] = []
        self._shapes: WeakKeyDictionary[Capture, CallShape] = WeakKeyDictionary()
        self._derived: WeakKeyDictionary[Capture, SymbolicCapture] = WeakKeyDictionary()
        self._tries: Counter[Hashable] = Counter()

    @property
    def captured(self) -> list[Signature]:
        """The signatures that are not derived from a family."""
        return [s for s in self.signatures if s.state.prepared.capture not in self._derived]

    def find(self, step: Step, call: StepCall) -> bool:
        """Makes the signature that holds for a call the first one; returns whether there is one."""
        for position, signature in enumerate(self.signatures):
            if signature.holds(step, call):
                self.signatures.insert(0, self.signatures.pop(position))
                return True
        return False

    def add(self, signature: Signature, call: StepCall) -> None:
        """Makes a planned signature the first one; the derived one called longest ago may be dropped."""
        self._shapes[signature.state.prepared.capture] = CallShape.of(call)
        self.signatures.insert(0, signature)
        captured = self.captured
        derived = [s for s in self.signatures if s not in captured and s.state.adopted is None]
        n_ops = 0
        for kept, other in enumerate(derived):
            problem = other.state.prepared.problem
            n_ops += len(problem.forward) + len(problem.backward)
            if n_ops > KEPT_OPS and kept >= LEAST_KEPT:
                self.signatures.remove(other)

    def without_derived(self) -> list[Signature]:
        """Returns the signatures less the derived ones, which are derived again when called; the first one stays."""
        captured = self.captured
        return [s for i, s in enumerate(self.signatures) if i == 0 or s in captured]

    def renew(self) -> None:
        """Makes the first signature, planned anew, the reference of its family, and drops what was derived before."""
        self.signatures = self.without_derived()
        state = self.signatures[0].state
        symbolic = self._derived.pop(state.prepared.capture, None)
        self.families = [replace(f, reference=state) if f.symbolic is symbolic else f for f in self.families]

    def derive(self, step: Step, call: StepCall, budget_bytes: int) -> Signature | None:
        """Plans a call of new sizes from a symbolic capture, which is made if the call is the second of its kind.

        Returns:
            None where the call must be captured as it is.
        """
        for family in self.families:
            sizes = family.sizes_of(step, call)
            if sizes is not None:
                return self._derived_signature(family, step, call, sizes, budget_bytes)
        found = self._new_family(step, call)
        if found is None:
            return None
        self.families.append(found)
        sizes = found.sizes_of(step, call)
        assert sizes is not None, "a symbolic capture holds for the call that it was traced with"
        return self._derived_signature(found, step, call, sizes, budget_bytes)

    def _derived_signature(
        self, family: SizeFamily, step: Step, call: StepCall, sizes: Sizes, budget_bytes: int
    ) -> Signature:
        reference = family.reference
        members = [s for s in self.signatures if self._is_member(s, family)]
        current = next((s.state for s in members if s.state.prepared.capture is reference.prepared.capture), reference)
        observed = members[0].observed if members else ObservedBackward()
        if members and members[0].state.prepared.expected != current.prepared.expected:
            current = members[0].state  # planned for the backward pass that is expected by now
        state = replace(family, reference=current).state_at(step, call, sizes, budget_bytes)
        self._derived[state.prepared.capture] = family.symbolic
        return Signature(state, observed=observed)

    def _is_member(self, signature: Signature, family: SizeFamily) -> bool:
        captured = signature.state.prepared.capture
        return captured is family.reference.prepared.capture or self._derived.get(captured) is family.symbolic

    def _new_family(self, step: Step, call: StepCall) -> SizeFamily | None:
        """Captures a call with those sizes symbolic in which it differs from an earlier one of its kind."""
        shape = CallShape.of(call)
        alike = (s.state for s in self.captured if self._shapes[s.state.prepared.capture].kind == shape.kind)
        state = next(alike, None)
        if state is None or self._tries[shape.kind] >= MOST_TRIES:
            return None
        earlier = self._shapes[state.prepared.capture]
        differing = earlier.differing(shape)
        if not differing:
            return None
        self._tries[shape.kind] += 1
        wanted = joined(differing, *(f.symbolic.dims for f in self.families if f.kind == shape.kind))
        with_batch = joined(wanted, shape.batch_dims())
        for dims in [with_batch, wanted] if with_batch != wanted else [wanted]:
            family = _captured_family(step, call, dims, state, earlier, shape.alike(earlier, dims))
            if family is not None:
                return family
        self._tries[shape.kind] += 1  # the next one would most likely be in vain, too
        return None


def _captured_family(
    step: Step, call: StepCall, dims: Dims, state: PlanningState, earlier: CallShape, alike: Dims
) -> SizeFamily | None:
    """Captures a call symbolically; None unless that is what the static capture of an earlier call of its kind is."""
    try:
        exact = not state.options.reordered
        symbolic = capture_symbolic(step, tuple(call.detached()), dims, alike=alike, exact=exact)
        graph, sizes = SymbolicGraph(symbolic.capture.joint), symbolic.sizes(step, *earlier.call())
        static = state.prepared.capture.joint
        if not sizes or fingerprint(graph.at(sizes)) != fingerprint(concretize(static, {})):
            return None
        return SizeFamily(earlier.kind, symbolic, graph, state, sized_step(symbolic, graph, sizes))
    except (FxHybridError, LookupError, ArithmeticError):
        return None  # a static capture says what is wrong, if anything is
