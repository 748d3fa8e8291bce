"""Decides which codecs each storage is offered, and says why one is offered none.

``codecs/candidate_codecs.py`` finds the codecs that fit a tensor's shape, type and maker; the rules here, all of them
in ``OfferRules``, ask what the step does with the tensor.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

import fxhybrid.ops.batch_norm
import fxhybrid.ops.masks  # noqa: F401  (both register operators named below)
from fxhybrid.capture.joint_graph import Phase, node_name, phase_of
from fxhybrid.codecs import NOISE_AT_4_BITS, Codec, TensorMeta, candidate_codecs
from fxhybrid.passes.build_problem import CodecChoices
from fxhybrid.passes.storages import Layout

aten = torch.ops.aten

# Arguments of backward operators that feel small errors only in proportion. Everything else, predicates and
# indices above all, is read exactly.
TOLERANT: dict[object, frozenset[int]] = {
    aten.convolution_backward.default: frozenset([1]),
    aten.native_batch_norm_backward.default: frozenset([1]),
    torch.ops.fxhybrid.batch_norm_backward.default: frozenset([1]),
    aten.native_layer_norm_backward.default: frozenset([1]),
    aten.native_group_norm_backward.default: frozenset([1]),
    aten._fused_rms_norm_backward.default: frozenset([1]),
    aten.gelu_backward.default: frozenset([1]),
    aten.silu_backward.default: frozenset([1]),
    aten.elu_backward.default: frozenset([6]),
    aten.tanh_backward.default: frozenset([1]),
    aten.sigmoid_backward.default: frozenset([1]),
    aten._softmax_backward_data.default: frozenset([1]),
    aten._log_softmax_backward_data.default: frozenset([1]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: frozenset([1, 2, 3, 4]),
    aten.mm.default: frozenset([0, 1]),
    aten.bmm.default: frozenset([0, 1]),
    aten.addmm.default: frozenset([1, 2]),
    aten.baddbmm.default: frozenset([1, 2]),
    aten.mul.Tensor: frozenset([0, 1]),
}
# Layers whose parameters' gradients are a product of the input and what comes from behind.
LAYERS = frozenset(
    [
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.convolution_backward.default,
    ]
)
# They take the part along their input out of a gradient, line by line: where that is most of it, an error of the input
# is felt out of proportion.
LINE_NORMS = frozenset([aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default])
KEEP_MASK = torch.ops.fxhybrid.keep_mask.default
SMALLEST_BYTES = 4096


def codec_choices(layout: Layout, *, lossy: bool, lossless: bool) -> CodecChoices:
    """Returns the specs of the codecs offered per storage; storages that are offered none are left out."""
    return OfferRules(layout, lossy, lossless).choices()


def codec_refusals(layout: Layout, *, lossy: bool, lossless: bool) -> Mapping[str, str]:
    """Returns, by name, why each forward storage that ``codec_choices`` leaves out is offered no codec, in words."""
    rules = OfferRules(layout, lossy, lossless)
    return {layout.storages[t].name: rules.refusal(t) for t in sorted(rules.forward) if not rules.offered(t)}


class OfferRules:
    """Holds the rules by which codecs are offered: each ``yield`` is one, in words, and the first that hits decides."""

    def __init__(self, layout: Layout, lossy: bool, lossless: bool) -> None:
        self.layout, self.lossy, self.lossless = layout, lossy, lossless
        self.sizes = [storage.size_bytes for storage in layout.storages]
        self.metas: Mapping[int, TensorMeta] | None = None
        self.found: dict[int, tuple[Codec, ...]] = {}
        self.forward = frozenset(t for op in layout.forward for t in op.outputs)
        self.readers = _backward_readers(layout)
        self.drifting = _drifting(layout)

    def resized(self, sizes: Sequence[int], metas: Mapping[int, TensorMeta]) -> OfferRules:
        """Returns the rules of the same step at other sizes.

        Args:
            sizes: bytes of each storage.
            metas: by storage, for those that some node reads whole.
        """
        rules = copy.copy(self)
        rules.sizes, rules.metas, rules.found = list(sizes), metas, {}
        return rules

    def choices(self) -> CodecChoices:
        """Returns the specs of the codecs offered per storage; storages that are offered none are left out."""
        offered = {t: tuple(codec.spec for codec in self.offered(t)) for t in range(len(self.sizes))}
        return {t: specs for t, specs in offered.items() if specs}

    def offered(self, t: int) -> list[Codec]:
        """Returns the codecs that no rule forbids."""
        if next(self._against_storage(t), None):
            return []
        return [codec for codec in self._candidates(t) if not next(self._against_codec(t, codec), None)]

    def refusal(self, t: int) -> str:
        """Returns the first rule that forbids all codecs, or else the most precise one."""
        for reason in self._against_storage(t):
            return reason
        return next(self._against_codec(t, self._candidates(t)[0]))

    def _against_storage(self, t: int) -> Iterator[str]:
        """Yields why a storage is offered no codec at all."""
        size_bytes = self.sizes[t]
        if not (self.lossy or self.lossless):
            yield "compression is off"
        if t not in self.forward:
            yield "the backward pass makes it"
        if t in self.layout.outputs:
            yield "it is an output, which the caller holds as it is until the step ends"
        if size_bytes < SMALLEST_BYTES:
            yield f"it has {size_bytes} bytes; below {SMALLEST_BYTES} a codec's calls cost more than they save"
        meta = self._meta(t)
        if meta is None:
            yield "no op reads it"
        elif meta.nbytes != size_bytes:
            yield f"its values take {meta.nbytes} of the {size_bytes} bytes of its storage"
        elif not self._candidates(t):
            yield f"no codec makes shape {meta.shape}, strides {meta.stride} of {meta.dtype} smaller"

    def _against_codec(self, t: int, codec: Codec) -> Iterator[str]:
        """Yields why a storage is not offered this codec."""
        if not (self.lossless if codec.lossless else self.lossy):
            yield f"{codec.spec} would fit, but is {'lossless' if codec.lossless else 'lossy'}: that is switched off"
        if codec.lossless:
            return
        if t not in self.readers:
            yield f"no backward op reads it{self._in_its_place(t)}; {codec.spec} is lossy, recomputing is exact"
        for reader, argument in self.readers.get(t, ()):
            if not _tolerates(reader, argument):
                yield f"{node_name(reader)} reads it, as argument {argument}, exactly; {codec.spec} is lossy"
        if t in self.drifting and codec.noise >= NOISE_AT_4_BITS:
            yield f"its error drifts in training (ADR 14); {codec.spec} has noise {codec.noise:g}, not below 1"

    def _candidates(self, t: int) -> tuple[Codec, ...]:
        if t not in self.found:
            meta = self._meta(t)
            self.found[t] = () if meta is None else candidate_codecs(meta, self.layout.storages[t].base)
        return self.found[t]

    def _meta(self, t: int) -> TensorMeta | None:
        if self.metas is not None:
            return self.metas.get(t)
        base = self.layout.storages[t].base
        return None if base is None else TensorMeta.of(base.meta["val"])

    def _in_its_place(self, t: int) -> str:
        """Names the mask that backward ops read instead, if there is one."""
        masks = [op.name for op in self.layout.forward if op.node.target is KEEP_MASK and t in op.inputs]
        return f", but its mask {masks[0]}" if masks else ""


def _backward_readers(layout: Layout) -> dict[int, list[tuple[fx.Node, int]]]:
    """Finds, for each storage, the backward ops that read it (through views) and at which argument."""
    readers: dict[int, list[tuple[fx.Node, int]]] = {}
    for op in layout.backward:
        for position, argument in enumerate((*op.node.args, *op.node.kwargs.values())):
            nodes: list[fx.Node] = []
            fx.node.map_arg(argument, nodes.append)
            for node in nodes:
                for storage in layout.storages_of.get(node, ()):
                    readers.setdefault(storage, []).append((op.node, position))
    return readers


def _drifting(layout: Layout) -> frozenset[int]:
    """Finds the storages whose error at 4 bits one batch at the start of training does not tell (docs/adr/0014).

    These are inputs of norms over lines, and of the output layer: what reads the forward pass first on the way back.
    """
    made = {s for op in layout.forward for s in op.outputs}
    layers = (op for op in layout.backward if op.node.target in LAYERS and made.intersection(op.inputs))
    norms = (op for op in layout.backward if op.node.target in LINE_NORMS)
    return frozenset(s for op in (*itertools.islice(layers, 1), *norms) for s in op.inputs)


def _tolerates(reader: fx.Node, argument: int) -> bool:
    return phase_of(reader) is Phase.BACKWARD and argument in TOLERANT.get(reader.target, ())
