"""What takes the gradients of leaves in a backward pass: sums in ``.grad``, or updates of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from fxhybrid.errors import BackwardError
from fxhybrid.ops.leaf_nodes import has_hooks, may_add, when_added, will_add
from fxhybrid.ops.take_gradient import Taker
from fxhybrid.torch_internals import graph_is_kept

MORE_GRADIENTS = (
    "a parameter gets a gradient from outside of the call in the same backward pass (a penalty on weights, a second "
    "call, weights that another module shares), after step_in_backward=True has updated it by the call's own: the "
    "other one is lost. Restore the parameters, and put all that reads them into the module or into loss_fn, or "
    "leave step_in_backward out"
)


class LeafNotes(Protocol):
    """Collects whether gradients of a call's inputs come from elsewhere, too."""

    def is_known(self, position: int) -> bool:
        """Tells whether that is known of an input."""

    def note_leaf(self, position: int, is_alone: bool) -> None:
        """Notes whether the call's own gradient of an input was all that the backward pass had for it."""


class Updates(Protocol):
    """Updates parameters in the backward pass."""

    @property
    def rise_bytes(self) -> Mapping[int, int]:
        """How far memory rises within each update, by position of the graph's input."""

    def takers(self, parameters: Mapping[int, Tensor]) -> dict[int, Taker]:
        """Returns what updates parameters, given by position, by their gradients; some may be left out."""


@dataclass(frozen=True, eq=False)
class LeafTakers:
    """Finds what takes the gradients of a call's inputs.

    Attributes:
        adding: positions of the inputs whose gradients are added to those that exist.
        values: by position of each input, the fake value of its gradient.
        updates: what updates parameters; None where nothing does.
    """

    adding: frozenset[int]
    values: Sequence[Tensor | None]
    updates: Updates | None

    @property
    def are_taken(self) -> bool:
        """Whether anything takes gradients before autograd does."""
        return bool(self.adding) or self.updates is not None

    def takers(self, nodes: Mapping[int, Any]) -> dict[int, Taker]:
        """Returns, by position, what takes gradients in the backward pass that runs.

        Args:
            nodes: that add gradients to the inputs.
        """
        found: dict[int, Taker] = {}
        for i in self.adding & nodes.keys():
            leaf, like = nodes[i].variable, self.values[i]
            if like is not None and may_add(leaf, like) and will_add(nodes[i]):
                found[i] = leaf.grad.add_
        if self.updates is not None and not graph_is_kept():
            leaves = {i: nodes[i].variable for i in self.updates.rise_bytes.keys() & nodes.keys() if will_add(nodes[i])}
            found |= self.updates.takers({i: p for i, p in leaves.items() if p.grad is None and not has_hooks(p)})
        return found

    def untaken(self, nodes: Mapping[int, Any], takers: Mapping[int, Taker]) -> frozenset[int]:
        """Returns the positions of the inputs whose gradients are kept to the end although that was not planned."""
        adding = (i for i in self.adding - takers.keys() if i not in nodes or nodes[i].variable.grad is not None)
        updating = () if self.updates is None else self.updates.rise_bytes.keys() - takers.keys()
        return frozenset((*adding, *updating))

    def watch(
        self,
        notes: LeafNotes,
        nodes: Mapping[int, Any],
        gradients: Sequence[Tensor | None],
        takers: Mapping[int, Taker],
    ) -> None:
        """Has noted, or refused, whether more than the call's own gradients arrive where these are added.

        Args:
            notes: are told.
            nodes: that add gradients to the inputs.
            gradients: that the call returns.
            takers: what took the others.
        """
        for i, node in nodes.items():
            if i in takers and i not in self.adding:
                when_added(node, None, _refuse_more)
            elif i in takers or (gradients[i] is not None and not notes.is_known(i)):
                when_added(node, gradients[i], partial(notes.note_leaf, i))


def _refuse_more(is_alone: bool) -> None:
    if not is_alone:
        raise BackwardError(MORE_GRADIENTS)
