"""Attribution: which tensors and channels cause the error of a lossy step.

A step with many lossy tensors moves all parameter gradients. Errors of single tensors add up as squares. What shows in
the parameters next to a tensor is caused by it: those of its reader (the input of a convolution is felt by nothing
else) and, where the error travels on, those of the op that made it. What shows further away cannot be told apart, so
steps in which only tensors of similar depth are lossy say more than one with all of them.

Within a tensor [N, C, ...] an error of variance step^2 / 12 meets gradients of known energy. That says how its effect
spreads over the channels in the mean; a single run says it only roughly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import fxhybrid.ops.batch_norm  # noqa: F401  (registers batch_norm_backward)
from fxhybrid.capture.joint_graph import InputKind, JointGraph, OutputKind
from fxhybrid.codecs import channels_per_row
from fxhybrid.passes.split import SplitGraphs
from fxhybrid.passes.storages import Layout, OpCall

aten = torch.ops.aten
CONVOLUTION = aten.convolution_backward.default
BATCH_NORMS = (aten.native_batch_norm_backward.default, torch.ops.fxhybrid.batch_norm_backward.default)


@dataclass(frozen=True)
class Share:
    """Says how the error of some parameters' gradients spreads over the rows of channels of one tensor.

    Attributes:
        parameters: names.
        weights: one per row of channels, in proportion to its squared error.
    """

    parameters: tuple[str, ...]
    weights: Tensor


@dataclass(frozen=True)
class Neighbours:
    """Names the parameters whose gradients feel a tensor first.

    Attributes:
        readers: those of the backward ops that read it.
        maker: those of the op that made it, if an error travels on to it.
        travels: whether an error reaches other gradients than the readers'.
    """

    readers: tuple[str, ...]
    maker: tuple[str, ...]
    travels: bool

    @property
    def all(self) -> frozenset[str]:
        """Both kinds."""
        return frozenset((*self.readers, *self.maker))


def neighbours(joint: JointGraph, layout: Layout, storages: Iterable[int]) -> dict[int, Neighbours]:
    """Finds the neighbouring parameters of each storage; both parts may be empty."""
    parameters = _parameter_names(joint)
    gradients: dict[int, str] = {}
    for node, role in zip(joint.output_nodes, joint.outputs, strict=True):
        if node is not None and role.kind is OutputKind.GRADIENT:
            name = parameters.get(joint.placeholders[role.of])
            gradients |= {storage: name for storage in layout.storages_of[node] if name}
    makers = {storage: op for op in layout.forward for storage in op.outputs}
    found = {}
    for storage in storages:
        readers = [op for op in layout.backward if storage in op.inputs]
        travels = any(_passes_on(op, gradients) for op in readers)
        found[storage] = Neighbours(
            tuple(sorted({gradients[s] for op in readers for s in op.outputs if s in gradients})),
            tuple(_read_parameters(makers[storage].node, parameters)) if travels else (),
            travels,
        )
    return found


def _parameter_names(joint: JointGraph) -> dict[fx.Node, str]:
    pairs = zip(joint.placeholders, joint.inputs, strict=True)
    return {n: role.name.removeprefix("model.") for n, role in pairs if role.kind is InputKind.PARAMETER}


def _passes_on(reader: OpCall, gradients: Mapping[int, str]) -> bool:
    """Says whether an error in what the op reads reaches other gradients than its own parameters'."""
    return reader.node.target is not CONVOLUTION and any(s not in gradients for s in reader.outputs)


def _read_parameters(node: fx.Node, parameters: Mapping[fx.Node, str]) -> list[str]:
    """Finds the parameters that an op reads, directly or through a view such as a transpose."""
    sources = [*node.all_input_nodes, *(n for view in node.all_input_nodes for n in view.all_input_nodes)]
    return sorted({parameters[n] for n in sources if n in parameters})


def tensor_errors(by_parameter: Mapping[str, float], near: Mapping[int, Neighbours]) -> dict[int, float]:
    """Charges each tensor with a squared error; their sum is that of ``by_parameter``.

    Args:
        by_parameter: squared errors, from a step in which exactly these tensors were lossy.
        near: their neighbours. A parameter next to several tensors charges each with an equal part. The error of
            all other parameters is shared evenly by the tensors whose errors travel.
    """
    claims = Counter(name for found in near.values() for name in found.all)
    rest = sum(error for name, error in by_parameter.items() if name not in claims)
    travelling = [storage for storage, found in near.items() if found.travels] or list(near)
    return {
        storage: sum(by_parameter.get(name, 0.0) / claims[name] for name in found.all)
        + (rest / len(travelling) if storage in travelling else 0.0)
        for storage, found in near.items()
    }


class ChannelWatch:
    """Notes during a backward pass how an error would spread over each tensor's rows of channels."""

    def __init__(self, layout: Layout, graphs: SplitGraphs) -> None:
        """Watches every convolution and batch norm of these halves; they must be compiled again after that."""
        self.near: Mapping[int, Neighbours] = {}
        self.shares: dict[int, list[Share]] = {}
        watched = {op.node.name: op for op in layout.backward if op.node.target in (CONVOLUTION, *BATCH_NORMS)}
        for node in graphs.backward.graph.nodes:
            op = watched.get(node.name)
            x = op.node.args[1] if op is not None else None
            behind = layout.storages_of.get(x, ()) if isinstance(x, fx.Node) else ()
            if len(behind) == 1:
                node.target = self._noting(node.target, behind[0])

    def start(self, near: Mapping[int, Neighbours]) -> None:
        """Looks at these tensors from now on, and forgets what was seen."""
        self.near, self.shares = near, {}

    def _noting(self, target: Callable[..., Any], storage: int) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            x = args[1]
            if storage in self.near and x.dim() >= 3 and x.is_contiguous() and x.numel():
                see = _convolution_shares if target is CONVOLUTION else _batch_norm_shares
                self.shares.setdefault(storage, []).extend(see(args, self.near[storage]))
            return target(*args, **kwargs)

        return noted

    def channel_errors(self, storage: int, by_parameter: Mapping[str, float], error: float) -> Tensor | None:
        """Returns the tensor's squared error spread over its rows of channels; None if nothing was seen of them."""
        shares = self.shares.get(storage, [])
        if not shares:
            return None
        total = torch.zeros_like(shares[0].weights)
        for share in shares:
            felt = sum(by_parameter.get(name, 0.0) for name in share.parameters)
            total += felt * share.weights / share.weights.sum().clamp(min=1e-300)
        return error * total / total.sum().clamp(min=1e-300)


def _squared_ranges(x: Tensor) -> Tensor:
    """Squares the range of each sample's rows of channels: [N, rows]."""
    per_row = channels_per_row(x.shape[1], x[0, 0].numel())
    low, high = x.reshape(x.shape[0], x.shape[1] // per_row, -1).aminmax(dim=2)
    return (high - low).double().square()


def _weights(x: Tensor, energy: Tensor) -> Tensor:
    """Sums over samples the squared range times the energy [N, C] of the gradients that a row's error meets."""
    ranges = _squared_ranges(x)
    return (ranges * energy.view(*ranges.shape, -1).sum(2)).sum(0)


def _energy(gradient: Tensor, parts: int) -> Tensor:
    """Sums the squares of each sample's ``parts`` equal parts: [N, parts]."""
    return gradient.reshape(gradient.shape[0], parts, -1).square().sum(2, dtype=torch.float64)


def _convolution_shares(args: tuple[Any, ...], near: Neighbours) -> list[Share]:
    gradient, x, groups = args[0], args[1], args[9]
    energy = _energy(gradient, groups).repeat_interleave(x.shape[1] // groups, dim=1)
    return [Share(near.readers, _weights(x, energy))]


def _batch_norm_shares(args: tuple[Any, ...], near: Neighbours) -> list[Share]:
    gradient, x, weight = args[:3]
    invstd = _inverse_deviation(args).double()
    energy = _energy(gradient, x.shape[1]) * invstd.square()  # of an error in the normalised input
    gain = invstd if weight is None else invstd * weight.double()
    return [Share(near.readers, _weights(x, energy)), Share(near.maker, _weights(x, energy * gain.square()))]


def _inverse_deviation(args: tuple[Any, ...]) -> Tensor:
    """Returns what a batch norm multiplies by: of the batch, or in evaluation mode the running one."""
    if len(args) == 7:  # fxhybrid's own, for training mode
        return args[4]  # type: ignore[no-any-return]
    training, eps = args[7:9]
    return args[6] if training else (args[4] + eps).rsqrt()  # type: ignore[no-any-return]
