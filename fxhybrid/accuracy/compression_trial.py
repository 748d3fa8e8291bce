"""Trial steps in which chosen saved tensors are lossy, without rewriting the graphs for each choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fxhybrid.accuracy.attribution import ChannelWatch, Neighbours
from fxhybrid.accuracy.step_result import squared_differences
from fxhybrid.accuracy.verifier import Reference
from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.ir.plan import SAVE, Action
from fxhybrid.pipeline import Prepared, build_graphs


class LossyStep:
    """Runs one captured step on one batch, each time with other tensors lossy.

    Masks are kept, so that what they derive from may be lossy. A lossy tensor goes through its codec when the backward
    pass begins: the gradients are those of a plan with these codecs, the memory is not.
    """

    def __init__(self, prepared: Prepared, reference: Reference) -> None:
        """Builds the graphs; runs nothing."""
        self.reference, self.expected = reference, reference.result.gradients
        self.specs: Mapping[int, str] = {}
        problem = prepared.problem
        masks: dict[int, Action] = {t: SAVE for i in problem.deferrable for t in problem.forward[i].outputs}
        self.graphs = build_graphs(prepared, masks)
        self.watch = ChannelWatch(prepared.layout, self.graphs)
        bases = {t: prepared.layout.storages[t].base for t in prepared.choices}
        self._pass_through({id(base.meta["val"]): t for t, base in bases.items() if base is not None})

    def _pass_through(self, storages: Mapping[int, int]) -> None:
        """Sends every saved tensor with choices through its present codec; keys are the fake tensors' ids."""
        graph = self.graphs.backward.graph
        saved = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_before(saved[-1].next):
            for node in saved:
                storage = storages.get(id(node.meta.get("val")))
                if storage is not None:
                    passed = graph.call_function(self._through(storage), (node,))
                    node.replace_all_uses_with(passed, delete_user_cb=lambda user, own=passed: user is not own)
        self.graphs.backward.recompile()

    def _through(self, storage: int) -> Callable[[Tensor], Tensor]:
        def through(x: Tensor) -> Tensor:
            if storage not in self.specs:
                return x
            codec = get_codec(self.specs[storage])
            return codec.decode(*codec.encode(x), TensorMeta.of(x))

        return through

    def differences(self, specs: Mapping[int, str], near: Mapping[int, Neighbours] | None = None) -> dict[str, float]:
        """Runs a step, and returns squared relative errors by parameter.

        Args:
            specs: codecs by storage.
            near: tensors whose channels are to be watched.
        """
        self.specs = specs
        self.watch.start(near or {})
        found = self.reference.run(self.graphs).gradients
        self.specs = {}
        return squared_differences(found, self.expected)

    def error(self, specs: Mapping[int, str]) -> float:
        """Runs a step, and returns the relative error of all parameter gradients."""
        return float(sum(self.differences(specs).values()) ** 0.5)
