"""Which gradients of a call can be added to older ones as soon as they are made."""

from __future__ import annotations

from fxhybrid.capture.step import Step
from fxhybrid.compiler.observed_backward import ObservedBackward
from fxhybrid.ops.leaf_nodes import may_add
from fxhybrid.pipeline import Prepared


def addable_inputs(step: Step, prepared: Prepared, observed: ObservedBackward) -> frozenset[int]:
    """Returns the positions of the graph's inputs whose gradients can be added at once.

    That holds for parameters with a gradient that nobody watches, where all backward passes so far had no gradient for
    them from elsewhere.

    Args:
        step: model and loss.
        prepared: the call's signature.
        observed: its backward passes.
    """
    named = dict(step.named_parameters()) if observed.alone else {}
    if all(p.grad is None for p in named.values()):
        return frozenset()
    gradients, names = prepared.gradient_nodes, prepared.capture.flat_names
    return frozenset(
        i
        for i in observed.alone & gradients.keys()
        if (leaf := named.get(names[i])) is not None and may_add(leaf, gradients[i].meta["val"])
    )
