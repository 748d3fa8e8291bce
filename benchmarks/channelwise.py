"""Widths per channel against uniform 4 bits: ``python -m benchmarks.channelwise``.

Trains a convolutional network on scikit-learn's digits, enlarged, and compares the gradient error of keeping all
inputs of a class of layers at 4 bits a row with that of channel-wise widths of no more bytes, on a batch that
the widths were not chosen on: before training, after it, and after it with the widths chosen before it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import names_of, wide_console
from fxhybrid.codecs import Codec, TensorMeta, assign_widths, channel_weights, channels_per_row, get_codec, register
from fxhybrid.codecs.reference import code_bytes
from fxhybrid.extras import require
from fxhybrid.options import make_options
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import SplitGraphs, split
from fxhybrid.plan import SAVE, Action, Compress
from fxhybrid.prepare import Prepared, build_graphs, prepare
from fxhybrid.schedule import Kind, lower
from fxhybrid.step import Step, StepCall
from fxhybrid.suite.convnets import MobileNetV2, ResNet
from fxhybrid.verify import Verifier

aten = torch.ops.aten

MODELS = {
    "resnet50": (lambda: ResNet((3, 4, 6, 3), n_classes=10), 8, 112),
    "mobilenetv2": (lambda: MobileNetV2(n_classes=10), 16, 96),
}
CLASSES = ("dense convolution", "depthwise convolution", "batch norm")


class Watch(Codec):
    """Row-wise 4 bits that note each tensor's channel weights: spec ``watch:K`` for the K-th tensor."""

    lossless, noise = False, 1.0
    rows: dict[int, str] = {}  # noqa: RUF012  filled by the comparison that registers the codec
    weights: dict[int, tuple[float, ...]] = {}  # noqa: RUF012

    def __init__(self, parameters: str) -> None:
        self.place = int(parameters)
        self.spec = f"watch:{self.place}"

    def supports(self, meta: TensorMeta) -> bool:
        return True

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return get_codec(self.rows[self.place]).encoded_bytes(meta)

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        per_row = channels_per_row(x.shape[1], x[0, 0].numel())
        self.weights[self.place] = channel_weights(x, per_row)
        return get_codec(self.rows[self.place]).encode(x)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        return get_codec(self.rows[self.place]).decode(qdata, header, meta)


class Keep(Codec):
    """A plain copy, for tensors that a comparison leaves exact: spec ``keep``."""

    spec, lossless = "keep", True

    def supports(self, meta: TensorMeta) -> bool:
        return meta.is_dense

    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        return meta.nbytes, 0

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        return x.detach().clone().view(-1).view(torch.uint8), torch.empty(0, dtype=torch.uint8)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        return qdata.view(meta.dtype).view(meta.shape).clone()


register("watch", Watch)
register("keep", lambda parameters: Keep())


@dataclass
class Comparison:
    """A model whose convolution and batch-norm inputs are kept at 4 bits, by one codec or another."""

    prepared: Prepared
    step: Step

    def __post_init__(self) -> None:
        prepared = self.prepared
        self.actions: dict[int, Action] = {
            t: SAVE for i in prepared.problem.deferrable for t in prepared.problem.forward[i].outputs
        }
        for storage, codecs in prepared.choices.items():
            four = next((c for c in codecs if c.startswith("rowwise4:")), None)
            if four is not None and len(self._value(storage).shape) == 4 and self._value(storage).is_contiguous():
                self.actions[storage] = Compress(four)
        instructions = lower(prepared.problem, self.actions).instructions
        encodes = [i for i in instructions if i.kind is Kind.ENCODE]
        self.rows = dict(enumerate(i.codec for i in encodes))
        self.metas = [TensorMeta.of(self._value(i.op)) for i in encodes]
        self.classes = {place: self._class_of(i.op) for place, i in enumerate(encodes)}

    def _class_of(self, storage: int) -> str:
        """What reads the tensor in the backward pass; empty if several kinds do."""
        found = set()
        for op in self.prepared.layout.backward:
            if storage in op.inputs:
                dense = op.node.target is not aten.convolution_backward.default or op.node.args[9] == 1
                name = "batch norm" if "batch_norm" in str(op.node.target) else "convolution"
                found.add(name if name == "batch norm" else f"{'dense' if dense else 'depthwise'} {name}")
        return found.pop() if len(found) == 1 else ""

    def only(self, name: str, codecs: Mapping[int, str]) -> dict[int, str]:
        """The codecs of one class of tensors; the others are kept."""
        return {place: codec if self.classes[place] == name else "keep" for place, codec in codecs.items()}

    def _value(self, storage: int) -> Tensor:
        root = self.prepared.layout.storages[storage].root
        assert root is not None
        value: Tensor = root.meta["val"]
        return value

    def graphs(self, codecs: Mapping[int, str]) -> SplitGraphs:
        """The step with the K-th encoded tensor under another codec."""
        joint = rewrite(self.prepared.joint, self.prepared.layout, lower(self.prepared.problem, self.actions))
        graph = joint.module.graph
        made = graph.find_nodes(op="call_function", target=torch.ops.fxhybrid.compress.default)
        for place, node in enumerate(made):
            node.update_arg(1, codecs[place])
            for part in list(node.users):
                for reader in list(part.users):
                    if reader.target is torch.ops.fxhybrid.decompress.default:
                        reader.update_arg(2, codecs[place])
        return split(joint)

    def widths(self, call: StepCall) -> dict[int, str]:
        """The best codecs by this batch's statistics, no larger than uniform 4 bits."""
        Watch.rows = self.rows
        self.verifier(call).run(self.graphs({place: f"watch:{place}" for place in self.rows}))
        found = {}
        for place, meta in enumerate(self.metas):
            weights = Watch.weights[place]
            row = meta.numel // meta.shape[0] // len(weights)
            row_bytes = {width: code_bytes(row, width) for width in (2, 4, 8)}
            spare = sum(get_codec(self.rows[place]).encoded_bytes(meta)) // meta.shape[0] - 8 * len(weights)
            total = min(spare, len(weights) * row_bytes[4]) if spare >= len(weights) * row_bytes[2] else 0
            digits = "".join(map(str, assign_widths(weights, row_bytes, total))) if total else ""
            codec = f"channelwise:{digits}"
            found[place] = codec if total and get_codec(codec).supports(meta) else self.rows[place]
        return found

    def n_bytes(self, codecs: Mapping[int, str]) -> int:
        """What the encoded tensors take, those kept left out."""
        spent = (sum(get_codec(codecs[p]).encoded_bytes(m)) for p, m in enumerate(self.metas) if codecs[p] != "keep")
        return sum(spent)

    def verifier(self, call: StepCall) -> Verifier:
        """A reference step on a batch."""
        return Verifier(
            self.prepared.capture,
            self.prepared.joint,
            self.step,
            call,
            save_all=lambda: build_graphs(self.prepared, {})[1],
            save_all_bytes=0,
        )


def batches(batch: int, pixels: int) -> Iterator[StepCall]:
    """Endless batches of enlarged digits."""
    data = require("sklearn.datasets", "the benchmark").load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        large = F.interpolate(images[chosen], size=pixels, mode="bilinear").expand(-1, 3, -1, -1)
        yield StepCall((large.contiguous(),), {}, (labels[chosen],))


Row = tuple[str, str, str, float, float, float]


def compare(name: str, steps: int) -> Iterator[Row]:
    """Rows of the table: when, widths chosen when, class, bytes over uniform's, both errors."""
    make, batch, pixels = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = make()
    step, data = Step(model, F.cross_entropy, False), batches(batch, pixels)
    chosen_on, tested_on = next(data), next(data)
    comparison = Comparison(prepare(step, chosen_on, make_options(budget=1.0, loss_fn=F.cross_entropy)), step)
    before = comparison.widths(chosen_on)
    yield from rows(comparison, tested_on, "before training", {"before": before})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for call in itertools.islice(data, steps):
        optimizer.zero_grad()
        loss = step(*call)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    when = f"after {steps} steps (loss {loss.item():.3f})"
    chosen = {"after": comparison.widths(chosen_on), "before": before}
    yield from rows(comparison, tested_on, when, chosen)


def rows(comparison: Comparison, call: StepCall, when: str, choices: Mapping[str, Mapping[int, str]]) -> Iterator[Row]:
    """One comparison for each class of tensors."""
    verifier = comparison.verifier(call)
    for name in CLASSES:
        uniform = comparison.only(name, comparison.rows)
        if not comparison.n_bytes(uniform):
            continue
        uniform_error = verifier.gradient_error(comparison.graphs(uniform))
        for chosen, codecs in choices.items():
            mixed = comparison.only(name, codecs)
            share = comparison.n_bytes(mixed) / comparison.n_bytes(uniform)
            yield when, chosen, name, share, uniform_error, verifier.gradient_error(comparison.graphs(mixed))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser("python -m benchmarks.channelwise", description=__doc__)
    parser.add_argument("--models", metavar="LIST", help=f"default: all of {','.join(MODELS)}")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    arguments = parser.parse_args(argv)
    table = Table(title="Gradient error: channel-wise widths against uniform 4 bits")
    for column in ("model", "when", "widths chosen", "inputs of", "bytes", "uniform", "channel-wise", "ratio"):
        table.add_column(column)
    for name in names_of(arguments.models, MODELS, "model"):
        for when, chosen, kind, share, uniform, mixed in compare(name, arguments.steps):
            errors = f"{share:.3f}", f"{uniform:.4f}", f"{mixed:.4f}", f"{mixed / uniform:.2f}"
            table.add_row(name, when, chosen, kind, *errors)
    wide_console().print(table)


if __name__ == "__main__":
    main()
