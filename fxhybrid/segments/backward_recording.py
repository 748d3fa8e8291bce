"""Runs the backward pass of a recorded step: graphs hand on zeros, so that Python's operators run between them.

A graph's backward half needs nothing for that, since its forward half has stored nothing. Gradients of leaves are left
out where a graph makes them: nothing is added to ``.grad``, and no hook of a leaf runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.accuracy.step_result import autograd_nodes
from fxhybrid.errors import CaptureError
from fxhybrid.passes.step_interface import StepInterface
from fxhybrid.runtime import Enter, LateBackward
from fxhybrid.segments.handed_storages import storage_identity
from fxhybrid.segments.leaf_notes import NOTHING_NEW

WITHIN_FORWARD = (
    "the forward pass takes the gradient of one of the step's graphs, in Python between them: what that takes cannot "
    "be counted. Write the inner gradient where it can be traced into the same graph, or compile submodules without it"
)


@dataclass(eq=False)
class ZeroHalves:
    """Stands for the backward halves of a recorded step.

    Attributes:
        mark: is called when a half begins, and when it ends, and at the end of the pass.
        first: is called when the first half begins.
        ran: positions of the parts whose half has run, in order.
        counted_bytes: in each of them, gradients that came to it, and those of other halves that are on their way,
            without those that the pass began with.
        carried_bytes: after each of them, the gradients that halves have made and that are still on their way.
    """

    mark: Callable[[], None]
    first: Callable[[], None]
    ran: list[int] = field(default_factory=list)
    counted_bytes: list[int] = field(default_factory=list)
    carried_bytes: list[int] = field(default_factory=list)
    _given: set[int] = field(default_factory=set)
    _made: list[tuple[StorageWeakRef, int]] = field(default_factory=list)
    _is_running: bool = False

    def enter(self, position: int, arguments: Sequence[Any], interface: StepInterface) -> Enter:
        """Returns what makes the backward half of a part one of zeros.

        Args:
            position: of the part.
            arguments: of the call.
            interface: of its joint graph.
        """
        history = (isinstance(t, Tensor) and t.grad_fn is not None for t in arguments)
        likes = [like if made else None for like, made in zip(interface.gradient_values, history, strict=True)]
        half = _ZeroHalf(self, position, likes)
        return lambda *_: half

    def run(self, results: Sequence[Tensor]) -> bool:
        """Runs the backward pass from ``results``, which need a gradient; says whether it came to its end."""
        leaves = [node.variable for node in autograd_nodes(results) if hasattr(node, "variable")]
        self._is_running = True
        try:
            with _without_hooks(leaves):
                zeros = [torch.zeros_like(t) for t in results]
                self._given = {storage_identity(t) for t in zeros}
                gradients = torch.autograd.grad(results, leaves, zeros, allow_unused=True)
                self.mark()
                del gradients
        except Exception:  # noqa: BLE001  of a hook or an operator, of any kind: the step's own backward pass will tell
            return False
        finally:
            self._is_running = False
        return True

    def begins(self, position: int) -> None:
        """Notes that a half begins.

        Raises:
            CaptureError: the step is in its forward pass.
        """
        if not self._is_running:
            raise CaptureError(WITHIN_FORWARD)
        if not self.ran:
            self.first()
        self.ran.append(position)
        self.mark()

    def ends(self, arrived: Sequence[Tensor], made: Sequence[Tensor | None]) -> None:
        """Notes what a half has made; what arrived goes now."""
        gone = {storage_identity(t): t.untyped_storage().nbytes() for t in arrived}
        others = sum(n for ref, n in self._made if ref.cdata not in gone and not ref.expired())  # type: ignore[no-untyped-call, misc]
        self.counted_bytes.append(others + sum(n for identity, n in gone.items() if identity not in self._given))
        new = [(_reference(t), t.untyped_storage().nbytes()) for t in made if t is not None]
        self._made += new
        self.carried_bytes.append(others + sum(n for _, n in new))
        self.mark()


class _ZeroHalf(nn.Module):
    """Is the backward half of one call, as autograd and :class:`ZeroHalves` see it."""

    leaf_notes = NOTHING_NEW
    left_out = None

    def __init__(self, halves: ZeroHalves, position: int, likes: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.halves, self.position, self.likes = halves, position, likes

    def begins(self, *_: frozenset[int]) -> LateBackward:
        """Takes the place of the half."""
        self.halves.begins(self.position)
        return LateBackward(self, (), (), 0)

    def forward(self, arguments: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Makes zeros for what has a history."""
        made = [None if like is None else _zeros(like) for like in self.likes]
        self.halves.ends([t for t in arguments if t is not None], made)
        return made


def _zeros(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).zero_()


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # keeps the identity


@contextlib.contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Puts away the hooks of leaves."""
    before = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for hooks, _ in before:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in before:
            hooks.update(kept)
