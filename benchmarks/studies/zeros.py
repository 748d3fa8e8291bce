"""Decides ADR 11: counts the zeros in saved tensors.

For suite models as they are initialised: the share of zeros in every float tensor that the forward pass would keep for
the backward pass, masks taken out (readers that need only a predicate have a mask of their own). A lossless sparse form
needs a bit per element and room for the non-zeros: 1/32 + 1 - zeros of the bytes, and a margin for other batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor

from benchmarks.lib.common import Bench, names_of, wide_console
from fxhybrid import suite
from fxhybrid.accuracy.verifier import Verifier
from fxhybrid.capture.joint_graph import node_name
from fxhybrid.capture.step import Step, StepCall
from fxhybrid.codecs import get_codec
from fxhybrid.ir.plan import SAVE, Action
from fxhybrid.options import Options
from fxhybrid.pipeline import build_graphs, prepare
from fxhybrid.units import format_bytes

MINUTES = 3
NEEDS = "transformers"

MARGIN = 0.05  # what a guaranteed capacity must leave above the share of one batch


@dataclass(frozen=True)
class Kept:
    """One saved float tensor.

    Attributes:
        maker: the operator that made it.
        n_bytes: as it is.
        zeros: share of its elements.
        smallest: the smallest share of the bytes among the codecs offered; 1 if none is.
    """

    maker: str
    n_bytes: int
    zeros: float
    smallest: float

    @property
    def sparse(self) -> float:
        """Share of the bytes that a bitmap and room for the non-zeros take."""
        return min(1.0, 1 / 32 + 1 - self.zeros + MARGIN)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs each model's forward pass once and prints what its saved tensors hold, by the operators that made them."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.zeros", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(suite.names())}")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    arguments = parser.parse_args(argv)
    table = Table(title="Saved float tensors, largest kinds first")
    for column in ("model", "made by", "tensors", "bytes", "zeros", "sparse form", "best codec offered", "sparse wins"):
        table.add_column(column)
    for name in names_of(arguments.models, suite.names(), "model"):
        found = list(saved_tensors(name, arguments.size))
        makers = {kept.maker: [k for k in found if k.maker == kept.maker] for kept in found}
        for maker, kept in sorted(makers.items(), key=lambda item: -sum(k.n_bytes for k in item[1])):
            total = sum(k.n_bytes for k in kept)
            shares = [sum(k.n_bytes * share(k) for k in kept) / total for share in (_zeros, _sparse, _smallest)]
            wins = sum(k.sparse < k.smallest for k in kept)
            figures = [f"{share:.3f}" for share in shares]
            table.add_row(name, maker, str(len(kept)), format_bytes(total), *figures, str(wins))
    wide_console().print(table)


def _zeros(kept: Kept) -> float:
    return kept.zeros


def _sparse(kept: Kept) -> float:
    return kept.sparse


def _smallest(kept: Kept) -> float:
    return kept.smallest


def saved_tensors(name: str, size: suite.Size) -> Iterator[Kept]:
    """What crosses from the forward to the backward graph if everything is kept, masks instead of their sources."""
    target = Bench(name, size).target
    step = Step(target.model, target.loss_fn, False)
    inputs, loss_args = target.inputs, tuple(target.loss_args)
    call = StepCall((), inputs, loss_args) if isinstance(inputs, dict) else StepCall(tuple(inputs), {}, loss_args)
    prepared = prepare(step, call, Options.checked(budget=1.0, loss_fn=target.loss_fn))
    problem, layout = prepared.problem, prepared.layout
    masks: dict[int, Action] = {t: SAVE for i in problem.deferrable for t in problem.forward[i].outputs}
    graphs = build_graphs(prepared, masks)
    makers = {t: op for op in layout.forward for t in op.outputs}
    storages = {id(s.base.meta["val"]): t for t, s in enumerate(layout.storages) if s.base is not None and t in makers}
    found: list[Kept] = []

    def look(x: Tensor, storage: int) -> Tensor:
        offered = (sum(get_codec(s).encoded_bytes(prepared.meta(storage))) for s in prepared.choices.get(storage, ()))
        smallest = min(offered, default=x.nbytes) / x.nbytes
        maker = node_name(makers[storage].node)
        found.append(Kept(maker, x.nbytes, float((x == 0).sum()) / x.numel(), smallest))
        return x

    graph = graphs.backward.graph
    saved = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(saved[-1].next):
        for node in saved:
            value, storage = node.meta.get("val"), storages.get(id(node.meta.get("val")))
            if storage is not None and value.is_floating_point() and value.numel():
                graph.call_function(look, (node, storage))
    graphs.backward.recompile()
    Verifier(prepared, step, call).run(graphs)
    yield from found


if __name__ == "__main__":
    main()
