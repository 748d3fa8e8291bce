"""A grammar of random modules: a case is plain data, which hypothesis draws, shrinks and prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz_kinds import LAYERS
from tests.fuzz_layers import WORDS, C, Context

MAX_LAYERS = 6
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """Holds one layer's name, its variant, and how far back the earlier value lies that it may read."""

    name: str
    variant: int = 0
    back: int = 1


@dataclass(frozen=True)
class Case:
    """Holds a random module, its input, and how its step is run.

    Attributes:
        kind: of the input.
        size: batch, then length, or height and width.
        layers: in order.
        outputs: values returned in addition to the last one, as (how far back, in which form).
        chosen: outputs that get a gradient.
        tied: whether linear layers of one shape share one weight.
        frozen: every how many parameters one needs no gradient; 0 for none.
        input_gradient: whether the input needs a gradient.
        dtype: of parameters and input.
        channels_last: whether parameters and input are.
        loss: whether the loss is planned too.
        compression: an option of compile.
        budget: place between the smallest peak (0) and that of save-all (1).
        calls: calls before one backward pass.
        accumulate: whether a further step adds to the gradients.
        later: batch sizes of steps that follow, all smaller.
        breaks: what Python does behind a layer, as (after how many layers, what); a graph ends there.
    """

    kind: str
    size: tuple[int, ...]
    layers: tuple[Layer, ...]
    outputs: tuple[tuple[int, str], ...] = ()
    chosen: tuple[int, ...] = (0,)
    tied: bool = False
    frozen: int = 0
    input_gradient: bool = False
    dtype: str = "float32"
    channels_last: bool = False
    loss: bool = False
    compression: str = "lossless"
    budget: float = 0.0
    calls: int = 1
    accumulate: bool = False
    later: tuple[int, ...] = ()
    breaks: tuple[tuple[int, str], ...] = ()


FORMS = {
    "itself": lambda y: y,
    "detached": lambda y: y.detach(),
    "slice": lambda y: y[:, 1:3],
    "transposed": lambda y: y.transpose(0, 1),
    "mean": lambda y: y.mean(),
    "normed": lambda y: nn.functional.layer_norm(y.movedim(1, -1), y.shape[1:2]),  # its gradient: channels come last
    "argmax": lambda y: y.argmax(1),
    "positive": lambda y: y > 0,
    "in a dict": lambda y: {"value": y * 1, "size": y.shape[0]},
}
WITHOUT_GRADIENT = ("detached", "argmax", "positive")


def _ended(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def _checked(x: Tensor) -> Tensor:
    return x if torch.isfinite(x).all() else torch.nan_to_num(x)


def _looked_at(x: Tensor) -> Tensor:
    return x * 0.5 if x.detach().float().mean().item() > 0 else x + 1


@torch._dynamo.disable
def _by_python(x: Tensor) -> Tensor:
    return (x * 1.5).abs()


@torch._dynamo.disable
def _in_place(x: Tensor) -> Tensor:
    return (x + 0.5).mul_(2)


@torch._dynamo.disable
def _kept_too(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x.detach() * 0.1)


BREAKS = {
    "ended": _ended,
    "checked": _checked,
    "looked at": _looked_at,
    "by Python": _by_python,
    "in place": _in_place,
    "kept too": _kept_too,
}


class RandomModule(nn.Module):
    """The module that a case describes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.first = nn.Linear(C, C) if case.kind in ("rows", "sequence") else nn.Identity()
        self.layers = nn.ModuleList()
        self.kinds = [case.kind]
        for layer in case.layers:
            self.layers.append(LAYERS[self.kinds[-1]][layer.name][layer.variant]())
            self.kinds.append(layer.name.removeprefix("to ") if layer.name.startswith("to ") else self.kinds[-1])
        self.last = nn.Parameter(torch.randn(()))
        self.to(DTYPES[case.dtype])
        if case.tied:
            self._tie()
        if case.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if case.frozen:
            for parameter in list(self.parameters())[:: case.frozen]:
                parameter.requires_grad_(False)

    def _tie(self) -> None:
        weights: dict[torch.Size, nn.Parameter] = {}
        for module in self.modules():
            if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d):
                module.weight = weights.setdefault(module.weight.shape, module.weight)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Any:
        values = [self.first(x)]
        for layer, module, kind in zip(self.case.layers, self.layers, self.kinds, strict=False):
            same_kind = [v for v, k in zip(values, self.kinds, strict=False) if k == kind]
            other = same_kind[max(-layer.back, -len(same_kind))]
            values.append(module(values[-1], Context(other, words, mask)))
            for what in (what for after, what in self.case.breaks if after == len(values) - 1):
                values[-1] = BREAKS[what](values[-1])
        outputs = [FORMS[form](values[max(-1 - back, -len(values))]) for back, form in self.case.outputs]
        return [values[-1] * self.last, *outputs]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """The arguments of a call; the same each time, the first one fresh."""
    generator = torch.Generator().manual_seed(1)
    batch, *space = case.size
    shape = (batch, *space, C) if case.kind in ("rows", "sequence") else (batch, C, *space)
    x = torch.randn(shape, generator=generator).to(DTYPES[case.dtype])
    if case.channels_last and case.kind == "image":
        x = x.contiguous(memory_format=torch.channels_last)
    words = torch.randint(WORDS, (batch,), generator=generator)
    return x.requires_grad_(case.input_gradient), words, torch.rand(batch, generator=generator) > 0.5


SIZES = {"rows": 0, "sequence": 1, "signal": 1, "image": 2}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws a case; the simplest is one layer on a few rows at the smallest budget."""
    kind = draw(st.sampled_from(sorted(SIZES, key=SIZES.__getitem__)))
    size = (draw(st.sampled_from([3, 5, 48])), *(draw(st.sampled_from([4, 6, 9])) for _ in range(SIZES[kind])))
    layers, at = [], kind
    for _ in range(draw(st.integers(1, MAX_LAYERS))):
        name = draw(st.sampled_from(list(LAYERS[at])))
        layers.append(Layer(name, draw(st.integers(0, len(LAYERS[at][name]) - 1)), draw(st.integers(1, 3))))
        at = name.removeprefix("to ") if name.startswith("to ") else at
    dtype = draw(st.sampled_from(["float32", "float32", "float32", "float64", "bfloat16"]))
    # a gradient that comes to a graph in another layout is rounded in another way, by tenths in bfloat16
    ends = st.tuples(st.integers(1, len(layers)), st.sampled_from(list(BREAKS)))
    several = draw(st.sampled_from([False, False, False, True])) and dtype != "bfloat16"
    breaks = tuple(draw(st.lists(ends, min_size=1, max_size=3))) if several else ()
    form = st.tuples(st.integers(0, len(layers)), st.sampled_from(list(FORMS)))
    outputs = tuple(draw(st.lists(form, max_size=3)))
    possible = [0, *(i for i, (_, form) in enumerate(outputs, 1) if form not in WITHOUT_GRADIENT)]
    chosen = draw(st.sets(st.sampled_from(possible), min_size=1))
    return Case(
        kind,
        size,
        tuple(layers),
        outputs,
        tuple(sorted(chosen)),
        tied=draw(st.booleans()),
        frozen=draw(st.sampled_from([0, 0, 2, 3])),
        input_gradient=draw(st.booleans()),
        dtype=dtype,
        channels_last=draw(st.booleans()),
        loss=(loss := draw(st.booleans())),
        compression=draw(st.sampled_from(["lossless", "off", "auto"] if loss else ["lossless", "off"])),
        budget=draw(st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.6, 1.0])),
        accumulate=draw(st.booleans()),
        later=draw(st.sampled_from([(), (20, 7, 33, 2)])) if size[0] == 48 else (),
        breaks=breaks,
    )
