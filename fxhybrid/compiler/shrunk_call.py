"""Makes room for a later call: a pending one lets go of tensors that its backward pass can recompute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxhybrid.compiler.late_backward import late_backward, stored_forms
from fxhybrid.compiler.storage_uses import PYTHON_USES, storage_uses
from fxhybrid.ir.plan import Actions
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.pipeline import Prepared
from fxhybrid.solvers.portfolio.limited_plans import PlanBytes


@dataclass(frozen=True, eq=False)
class Shrunk:
    """Holds what is left of a call.

    Attributes:
        kept: names of the stored tensors that are still there.
        inputs: what the backward pass recomputes from.
        freed: identities of the storages that were let go.
    """

    kept: frozenset[str]
    inputs: tuple[Tensor | None, ...]
    freed: frozenset[int]


def shrink(
    prepared: Prepared,
    actions: Actions,
    graphs: SplitGraphs,
    target: Actions,
    inputs: Sequence[Tensor | None],
    held: Sequence[tuple[StorageWeakRef, int]],
    room_bytes: int,
) -> tuple[Shrunk, PlanBytes] | None:
    """Lets go of what a plan would not store, if the backward pass can do without.

    Args:
        prepared: the signature.
        actions: of the plan by which the forward pass ran.
        graphs: its halves.
        target: actions of the other plan.
        inputs: the graph's inputs as they were; None for those that are gone or were changed.
        held: saved values, then outputs, each with its bytes.
        room_bytes: what the backward pass may take.

    Returns:
        What is left, and what it needs (the peak is that of the backward pass); None if nothing can be let go.
    """
    stored, wanted = (stored_forms(prepared.problem, plan) for plan in (actions, target))
    kept = frozenset(name for name in stored if name in wanted)  # in the form that it has
    present = frozenset(prepared.traced.tangents.values()) - prepared.expected.absent
    late = late_backward(prepared, actions, graphs, present, inputs, room_bytes, kept)
    if late is None or len(held) < graphs.n_saved:
        return None
    saved, outputs = held[: graphs.n_saved], held[graphs.n_saved :]
    others = {t.untyped_storage()._cdata for t in inputs if t is not None} | {ref.cdata for ref, _ in outputs}
    left = {saved[i][0].cdata: saved[i][1] for i in late.saved}
    freed = _free([ref for ref, _ in saved], others.union(left))
    if not freed:
        return None
    held_bytes = sum({**left, **{ref.cdata: n_bytes for ref, n_bytes in outputs}}.values())
    output_bytes = sum(n_bytes for _, n_bytes in outputs)
    return Shrunk(kept, late.inputs, freed), PlanBytes(late.peak_bytes, held_bytes, late.peak_bytes + output_bytes)


def _free(saved: Sequence[StorageWeakRef], needed: Collection[int]) -> frozenset[int]:
    """Frees the storages that nobody else holds or needs; returns their identities."""
    counts = Counter(ref.cdata for ref in saved)
    freed = set()
    for ref in {ref.cdata: ref for ref in saved}.values():
        alone = not ref.expired() and storage_uses(ref) <= counts[ref.cdata] + PYTHON_USES  # type: ignore[no-untyped-call]
        if not alone or ref.cdata in needed:
            continue
        storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)  # noqa: SLF001 (no public name)
        if storage is not None and storage.resizable():
            storage.resize_(0)
            freed.add(ref.cdata)
    return frozenset(freed)
