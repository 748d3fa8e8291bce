"""Builds the planning problem: layout and profile become plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import fx

from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.origins import origins
from fxhybrid.codecs import TensorMeta, get_codec
from fxhybrid.ir.problem import CodecOption, Fusion, Op, Problem, Tensor
from fxhybrid.passes.gradient_takes import TAKE
from fxhybrid.passes.storages import Layout, OpCall, Storage, fused_form
from fxhybrid.profiling.cost_cache import OpCost
from fxhybrid.profiling.op_profiler import Call, Profile, call_of
from fxhybrid.torch_internals import FakeTensor

CodecChoices = Mapping[int, tuple[str, ...]]
UPDATE = "optimizer.step"


class StepCosts(Protocol):
    """Tells what the calls of a step cost."""

    def of_op(self, op: OpCall) -> OpCost:
        """Returns the cost of an op."""

    def of_fused(self, op: OpCall) -> OpCost:
        """Returns the cost of a backward op in its fused form."""

    def of_codec(self, storage: int, codec: str) -> tuple[OpCost, OpCost]:
        """Returns the costs of encoding and decoding a storage."""

    def meta(self, storage: int) -> TensorMeta:
        """Returns the meta of a storage that is offered codecs."""


@dataclass(frozen=True, eq=False)
class ProfiledCosts:
    """Reads the costs of a step's calls from a profile."""

    layout: Layout
    profile: Profile

    def of_op(self, op: OpCall) -> OpCost:
        """Returns the cost of an op."""
        return self.profile.cost(_op_call(op))

    def of_fused(self, op: OpCall) -> OpCost:
        """Returns the cost of a backward op in its fused form."""
        form = fused_form(op.node)
        assert form is not None, "only ops with a mask have a fused form"
        return self.profile.cost(call_of(*form))

    def of_codec(self, storage: int, codec: str) -> tuple[OpCost, OpCost]:
        """Returns the costs of encoding and decoding a storage."""
        value = base_value(self.layout, storage)
        costs = [self.profile.cost(call) for call in codec_calls(value, get_codec(codec).profiled_as().spec)]
        return codec_costs(codec, TensorMeta.of(value), costs[0], costs[1])

    def meta(self, storage: int) -> TensorMeta:
        """Returns the meta of a storage that is offered codecs."""
        return TensorMeta.of(base_value(self.layout, storage))


def calls_of(layout: Layout, choices: CodecChoices) -> Iterable[Call]:
    """Yields every call whose cost the problem needs: ops, and encode and decode of each offered codec."""
    for op in layout.forward + layout.backward:
        yield _op_call(op)
        form = fused_form(op.node)
        if form:
            yield call_of(*form)
    for storage, codecs in choices.items():
        for codec in codecs:
            yield from codec_calls(base_value(layout, storage), get_codec(codec).profiled_as().spec)


def problem_of(
    joint: JointGraph,
    layout: Layout,
    profile: Profile,
    choices: CodecChoices,
    errors: Mapping[tuple[int, str], float],
    resident_bytes: int,
    absent: AbstractSet[int] = frozenset(),
    update_rise_bytes: Mapping[int, int] | None = None,
) -> Problem:
    """Builds the planning problem of ``layout`` with ``profile``'s costs.

    Args:
        joint: the graph, with the roles of inputs and outputs.
        layout: its storages and operators.
        profile: seconds and workspace of every operator and codec.
        choices: codecs offered per storage.
        errors: relative gradient error of each (storage, lossy codec).
        resident_bytes: everything that is alive through the whole step.
        absent: positions of the tangents that do not arrive.
        update_rise_bytes: how far memory rises while a parameter is updated in the backward pass, by position.
    """
    arriving = (n for k, n in enumerate(joint.tangents) if k not in absent)
    places = {node: str(origin) for node, origin in origins(joint.module.graph.nodes).items()}
    costs = ProfiledCosts(layout, profile)
    forward, backward = ops_of(layout, costs, places, update_rise_bytes or {})
    return Problem(
        tensors=tensors_of(layout.storages, costs, choices, errors),
        forward=forward,
        backward=backward,
        outputs=layout.outputs,
        mutations=layout.mutations,
        gradients=layout.gradients,
        resident_bytes=resident_bytes,
        tangent_bytes=sum(n.meta["val"].untyped_storage().nbytes() for n in arriving),
    )


def with_update(problem: Problem, rise_bytes: int) -> Problem:
    """Returns the problem of the whole iteration: then the optimizer steps, with all gradients alive.

    It reads and makes nothing that a plan decides on, so no node of the graphs stands for it, and it takes no time
    that a plan could add to.
    """
    update = Op(UPDATE, (), (), 0.0, rise_bytes)
    return replace(problem, backward=(*problem.backward, update))


def with_codec_options(
    problem: Problem, layout: Layout, profile: Profile, choices: CodecChoices, errors: Mapping[tuple[int, str], float]
) -> Problem:
    """Returns the problem of ``layout`` with other codecs offered, or other errors; all else stays."""
    tensors = tensors_of(layout.storages, ProfiledCosts(layout, profile), choices, errors)
    return replace(problem, tensors=tensors)


def tensors_of(
    storages: Sequence[Storage],
    costs: StepCosts,
    choices: CodecChoices,
    errors: Mapping[tuple[int, str], float],
) -> tuple[Tensor, ...]:
    """Builds the tensors of a problem, with the codecs that each is offered."""
    return tuple(
        Tensor(s.name, s.size_bytes, _options(costs, i, choices.get(i, ()), errors)) for i, s in enumerate(storages)
    )


def ops_of(
    layout: Layout, costs: StepCosts, places: Mapping[fx.Node, str], rises: Mapping[int, int]
) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Builds the ops of a problem, forward and backward.

    Args:
        layout: with the calls.
        costs: of the calls.
        places: in the user's model, by node.
        rises: how far memory rises while a parameter is updated in the backward pass, by position.
    """
    forward = [_op(op, costs, places) for op in layout.forward]
    backward = []
    for call, op in ((op, _op(op, costs, places)) for op in layout.backward):
        if call.node.target is TAKE:
            position = cast(int, call.node.args[1])
            op = replace(op, alloc_peak_bytes=op.alloc_peak_bytes + rises.get(position, 0))
        if call.fused_with is None:
            backward.append(op)
            continue
        fused, mask = costs.of_fused(call), forward[call.fused_with]
        kept_s = max(mask.seconds + op.seconds - fused.seconds, 0.0)
        forward[call.fused_with] = replace(mask, seconds=kept_s)
        backward.append(replace(op, seconds=fused.seconds, fusion=Fusion(call.fused_with, fused.alloc_peak_bytes)))
    return tuple(forward), tuple(backward)


def _op(op: OpCall, costs: StepCosts, places: Mapping[fx.Node, str]) -> Op:
    cost = costs.of_op(op)
    figures = cost.seconds, cost.alloc_peak_bytes
    return Op(op.name, op.inputs, op.outputs, *figures, op.recomputable, op.pinned, place=places.get(op.node, ""))


def _op_call(op: OpCall) -> Call:
    args = (op.node.args[0], 0) if op.node.target is TAKE else op.node.args  # which parameter it is costs nothing
    return call_of(op.node.target, args, op.node.kwargs)


def base_value(layout: Layout, storage: int) -> torch.Tensor:
    """Returns the fake value of a storage that is read whole."""
    base = layout.storages[storage].base
    assert isinstance(base, fx.Node), "codecs are offered only for storages that are read"
    value: torch.Tensor = base.meta["val"]
    return value


def codec_calls(value: torch.Tensor, codec: str) -> tuple[Call, Call]:
    """Returns the calls that encode and decode a value."""
    encode = _by_kernels(call_of(torch.ops.fxhybrid.compress.default, (value, codec)), codec)
    qdata_bytes, header_bytes = get_codec(codec).encoded_bytes(TensorMeta.of(value))
    parts = [_bytes_like(value, n) for n in (qdata_bytes, header_bytes)]
    shape: tuple[Any, ...] = (list(value.shape), list(value.stride()), value.dtype)
    return encode, _by_kernels(call_of(torch.ops.fxhybrid.decompress.default, (*parts, codec, *shape)), codec)


def _bytes_like(value: torch.Tensor, n_bytes: int) -> torch.Tensor:
    """Makes a fake tensor of bytes on the device of another fake one; dispatch would take ten times as long."""
    plain = torch.empty(n_bytes, dtype=torch.uint8, device="meta")
    return FakeTensor(value.fake_mode, plain, value.device) if isinstance(value, FakeTensor) else plain


def codec_costs(codec: str, meta: TensorMeta, encode: OpCost, decode: OpCost) -> tuple[OpCost, OpCost]:
    """Returns what encode and decode cost: the seconds of the codec that stands in for it, and its own bytes."""
    stand_in = get_codec(codec).profiled_as()
    more = sum(get_codec(codec).encoded_bytes(meta)) - sum(stand_in.encoded_bytes(meta))
    return replace(encode, alloc_peak_bytes=encode.alloc_peak_bytes + more), decode


def _by_kernels(call: Call, codec: str) -> Call:
    """Tells the call apart from the same one by other kernels: costs are kept on disk by key."""
    kernels = get_codec(codec).kernels_key
    return replace(call, key=f"{call.key} by {kernels}") if kernels else call


def _options(
    costs: StepCosts,
    storage: int,
    codecs: tuple[str, ...],
    errors: Mapping[tuple[int, str], float],
) -> tuple[CodecOption, ...]:
    options = []
    for text in codecs:
        codec = get_codec(text)
        encode, decode = costs.of_codec(storage, text)
        options.append(
            CodecOption(
                text,
                sum(codec.encoded_bytes(costs.meta(storage))),
                encode.seconds,
                decode.seconds,
                encode.alloc_peak_bytes,
                decode.alloc_peak_bytes,
                codec.lossless,
                0.0 if codec.lossless else errors[storage, text],
            )
        )
    return tuple(options)
