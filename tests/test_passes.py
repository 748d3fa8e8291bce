"""One golden text per pass: the graph before, the graph after."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from torch import Tensor, nn

from fxhybrid.capture.capture import capture
from fxhybrid.capture.joint_graph import JointGraph
from fxhybrid.capture.step import Step
from fxhybrid.codecs import get_codec
from fxhybrid.ir.plan import RECOMPUTE, Action, Compress
from fxhybrid.ir.problem import Problem
from fxhybrid.ir.schedule import lower
from fxhybrid.passes.boundaries import with_boundaries
from fxhybrid.passes.build_problem import calls_of, problem_of
from fxhybrid.passes.canonicalize import canonicalize
from fxhybrid.passes.codec_choices import codec_choices
from fxhybrid.passes.error_prior import error_table, lossy_groups
from fxhybrid.passes.fingerprint import fingerprint
from fxhybrid.passes.graph_edit import backward_nodes
from fxhybrid.passes.rewrite import rewrite
from fxhybrid.passes.split import split
from fxhybrid.passes.storages import Layout, layout_of
from fxhybrid.profiling.op_profiler import profile_calls
from fxhybrid.profiling.synthetic_inputs import synthetic_arguments
from tests.graph_text import graph_text


class TwoLayers(nn.Module):
    """Linear, ReLU, Linear: 64 x 64 float32 activations of 16 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64, bias=False)
        self.b = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))).sum()


def joint_of(model: nn.Module, *inputs: Tensor) -> JointGraph:
    return capture(Step(model, None, False), (inputs, {}, ())).joint


@pytest.fixture(scope="module")
def planned() -> tuple[JointGraph, Layout, Problem]:
    joint = canonicalize(joint_of(TwoLayers(), torch.randn(64, 64)))
    layout = layout_of(joint)
    choices = codec_choices(layout, lossy=True, lossless=True)
    profile = profile_calls(calls_of(layout, choices))
    errors = error_table(lossy_groups(layout, choices), choices, lambda _: 0.09)
    return joint, layout, problem_of(joint, layout, profile, choices, errors, 0)


def rewritten(planned: tuple[JointGraph, Layout, Problem], actions: dict[str, Action]) -> JointGraph:
    joint, layout, problem = planned
    return rewrite(joint, layout, lower(problem, {problem.index[name]: a for name, a in actions.items()}))


def expect(found: str, expected: str) -> None:
    assert found == dedent(expected).strip()


def test_canonicalize_gives_relu_a_mask_and_weight_gradients_come_first() -> None:
    before = joint_of(TwoLayers(), torch.randn(64, 64))
    assert "B threshold_backward = threshold_backward(mm_3, detach_1, 0)" in graph_text(before)
    assert "fxhybrid" not in graph_text(before)
    expect(
        graph_text(canonicalize(before)),
        """
        F primals_1
        F primals_2
        F primals_3
        B tangents_1
        F t = t(primals_1)
        F mm = mm(primals_2, t)
        F relu = relu(mm)
        F detach = detach(relu)
        F detach_1 = detach(detach)
        F keep_mask_default = fxhybrid.keep_mask(detach_1, 0.0, None)
        F t_1 = t(primals_3)
        F mm_1 = mm(relu, t_1)
        F sum_1 = sum(mm_1)
        B expand = expand(tangents_1, [64, 64])
        B t_2 = t(expand)
        B mm_2 = mm(t_2, relu)
        B t_3 = t(mm_2)
        B t_5 = t(t_3)
        B t_4 = t(t_1)
        B mm_3 = mm(expand, t_4)
        B apply_mask_default = fxhybrid.apply_mask(mm_3, keep_mask_default)
        B t_6 = t(apply_mask_default)
        B mm_4 = mm(t_6, primals_2)
        B t_7 = t(mm_4)
        B t_8 = t(t_7)
        return (sum_1, t_8, None, t_5)
        """,
    )
    assert "fxhybrid" not in graph_text(before), "canonicalize must leave its input alone"


def test_weight_gradients_come_first_where_output_gradients_come_from_outside() -> None:
    """The last layer's (2 x 8) reads only its input and what arrives; the gradient of its input (32 x 8) comes next."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    joint = canonicalize(with_boundaries(joint_of(model, torch.randn(32, 4, requires_grad=True)), ()))
    products = [n for n in backward_nodes(joint) if n.target is torch.ops.aten.mm.default]
    assert [tuple(n.meta["val"].shape) for n in products[:2]] == [(2, 8), (32, 8)]


def test_layout_counts_storages_and_not_views(planned: tuple[JointGraph, Layout, Problem]) -> None:
    _, layout, problem = planned
    # mm 16 KiB, relu 16 KiB, mask 4 KiB (bool), mm_1 16 KiB, sum 4 bytes; t and detach allocate nothing
    assert [op.name for op in layout.forward] == [
        "mm.default.0", "relu.default.0", "keep_mask.default.0", "mm.default.1", "sum.default.0",
    ]  # fmt: skip
    assert [problem.tensors[i].size_bytes for i in range(5)] == [16384, 16384, 4096, 16384, 4]
    assert {problem.tensors[t].name for t in problem.candidates} == {
        "mm.default.0", "relu.default.0", "keep_mask.default.0",
    }  # fmt: skip


def test_only_tolerant_readers_get_lossy_codecs(planned: tuple[JointGraph, Layout, Problem]) -> None:
    _, _, problem = planned
    offered = {t.name: [o.codec for o in t.codecs] for t in problem.tensors if t.codecs}
    assert offered == {
        "relu.default.0": ["rowwise8:64"],  # no 4 bits: the input of the output layer
        "keep_mask.default.0": ["bitpack"],
    }


def test_lines_of_attention_weights_and_planes_of_feature_maps_are_rows() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.first(x))
            weights = torch.softmax(x @ x.transpose(2, 3), -1)
            return self.last(torch.dropout(weights, 0.1, True) @ x).sum()

    # [2, 4, 48, 48]: a plane has 2,304 elements, two lines of 48 have 96
    layout = layout_of(canonicalize(joint_of(Attention(), torch.randn(2, 4, 48, 48))))
    choices = codec_choices(layout, lossy=True, lossless=False)
    offered = {layout.storages[t].name: specs for t, specs in choices.items()}
    lines, planes = ("sqrt8:96", "sqrt4:96"), ("rowwise8:2304", "rowwise4:2304")
    assert offered["_softmax.default.0"] == offered["native_dropout.default.0:0"] == lines
    assert offered["sigmoid.default.0"] == planes


def test_inputs_of_layer_norms_and_of_the_output_layer_get_8_bits() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = (nn.Linear(64, 64) for _ in range(3))
            self.norm = nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            x = torch.sigmoid(self.inner(x))
            return self.last(x).sum()

    layout = layout_of(canonicalize(joint_of(Block(), torch.randn(64, 64))))
    choices = codec_choices(layout, lossy=True, lossless=False)
    assert {layout.storages[t].name: specs for t, specs in choices.items()} == {
        "addmm.default.0": ("rowwise8:64",),  # read by the layer norm
        "native_layer_norm.default.0:0": ("rowwise8:64", "rowwise4:64"),  # read by the inner linear layer
        "sigmoid.default.0": ("rowwise8:64",),  # read by the last one
    }


def test_rewrite_compresses_after_the_last_read_and_decodes_before_the_first(
    planned: tuple[JointGraph, Layout, Problem],
) -> None:
    actions: dict[str, Action] = {
        "relu.default.0": Compress("rowwise8:64"),
        "keep_mask.default.0": Compress("bitpack"),
    }
    text = graph_text(rewritten(planned, actions)).splitlines()
    at = {line.split(" = ")[0].split()[-1]: number for number, line in enumerate(text)}
    assert text[at["compress_1"] - 1] == "F mm_1 = mm(relu, t_1)"
    assert text[at["compress_0"]] == "F compress_0 = fxhybrid.compress(keep_mask_default, bitpack)"
    assert text[at["decompress_1"] + 1] == "B apply_mask_default = fxhybrid.apply_mask(mm_3, decompress_1)"
    assert text[at["decompress_0"]].startswith("B decompress_0 = fxhybrid.decompress(getitem_2, getitem_3, rowwise8:64")
    assert text[at["mm_2"]] == "B mm_2 = mm(t_2, decompress_0)"


def test_split_carries_what_the_plan_stores_and_nothing_else(planned: tuple[JointGraph, Layout, Problem]) -> None:
    halves = split(rewritten(planned, {"relu.default.0": RECOMPUTE}))
    expect(
        graph_text(halves.forward),
        """
        F primals_1
        F primals_2
        F primals_3
        F t = t(primals_1)
        F mm = mm(primals_2, t)
        F relu = relu(mm)
        F t_1 = t(primals_3)
        F mm_1 = mm(relu, t_1)
        F sum_1 = sum(mm_1)
        return [sum_1, mm]
        """,
    )
    expect(
        graph_text(halves.backward),
        """
        F mm
        F primals_2
        F primals_3
        B tangents_1
        B recompute_0 = relu(mm)
        B expand = expand(tangents_1, [64, 64])
        B t_2 = t(expand)
        B mm_2 = mm(t_2, recompute_0)
        B mm_3 = mm(expand, primals_3)
        B apply_mask_default = threshold_backward(mm_3, recompute_0, 0.0)
        B t_6 = t(apply_mask_default)
        B mm_4 = mm(t_6, primals_2)
        return [mm_4, None, mm_2]
        """,
    )
    assert (halves.n_saved, halves.resident_inputs) == (1, (1, 2))


def test_convolution_batch_norm_and_pool_take_their_lean_forms() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    before = joint_of(model, torch.randn(2, 4, 16, 16))
    after = graph_text(canonicalize(before))
    assert graph_text(before).count("convolution_backward(") == 2
    # the first convolution's input needs no gradient and stays one call; the second becomes weight gradient,
    # then input gradient as a transposed convolution that does not read the input
    assert after.count("convolution_backward(") == 2
    assert after.count("[False, True, True])") == 2
    assert ", True, [0, 0], 1)" in after
    assert "native_batch_norm_backward" not in after
    assert "fxhybrid.batch_norm_backward(" in after
    # the pool's backward pass reads its input's shape only
    assert "B empty_memory_format = empty.memory_format([1, 1, 1, 1]" in after
    pool = next(line for line in after.splitlines() if "max_pool2d_with_indices_backward(" in line)
    assert "expand_default" in pool


def test_what_reads_contents_that_the_step_overwrites_is_never_run_again() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = (self.weight * (self.mean + x)).sum()
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x, alpha=0.1)
            return y

    layout = layout_of(canonicalize(joint_of(Average(), torch.randn(8))))
    recomputable = {op.name: op.recomputable for op in layout.forward}
    assert not recomputable["add.Tensor.0"], "it reads the mean, which is another one by the time of the backward pass"
    assert recomputable["mul.Tensor.0"], "weight and the sum are still what they were"


def test_fingerprint_tells_structure_and_not_names() -> None:
    def of(model: nn.Module, rows: int) -> str:
        return fingerprint(canonicalize(joint_of(model, torch.randn(rows, 64))))

    model = TwoLayers()
    assert of(model, 64) == of(TwoLayers(), 64)
    assert of(model, 64) != of(model, 32)
    assert of(nn.Sequential(model.a, nn.Tanh(), model.b), 64) != of(nn.Sequential(model.a, nn.ReLU(), model.b), 64)


def test_decoding_is_measured_on_real_data_of_the_tensors_own_device(
    planned: tuple[JointGraph, Layout, Problem],
) -> None:
    _, layout, problem = planned
    calls = calls_of(layout, codec_choices(layout, lossy=True, lossless=True))
    decodes = [call for call in calls if call.target is torch.ops.fxhybrid.decompress.default]
    assert decodes
    assert not [call.key for call in calls if "meta" in call.key]
    # run for real, decoding writes the whole tensor: 64 x 64 float32 are 16 KiB, a mask of bools 4 KiB (and the
    # operators' scalars a few bytes)
    rises = {o.codec: o.decode_alloc_peak_bytes for t in problem.tensors for o in t.codecs}
    assert rises["rowwise8:64"] == 16 * 1024
    assert 4 * 1024 <= rises["bitpack"] < 4 * 1024 + 64
    call = next(call for call in decodes if "rowwise8" in call.key)
    arguments, _ = synthetic_arguments(call.target, call.args, call.kwargs)
    decoded = torch.ops.fxhybrid.decompress(*arguments)
    assert decoded.isfinite().all()
    assert decoded.std() > 0.1


def test_codec_costs_are_kept_per_kernels(
    planned: tuple[JointGraph, Layout, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, layout, _ = planned
    choices = codec_choices(layout, lossy=True, lossless=True)
    before = {call.key for call in calls_of(layout, choices)}
    monkeypatch.setattr(get_codec("rowwise8:64"), "kernels_key", "other")
    changed = before ^ {call.key for call in calls_of(layout, choices)}
    # encode and decode of the one codec, and nothing else: under the old key and under the new one
    assert len(changed) == 2 * 2
    assert all("rowwise8:64" in key for key in changed)


def test_every_lossy_choice_counts_in_the_problem(planned: tuple[JointGraph, Layout, Problem]) -> None:
    options = [option for tensor in planned[2].tensors for option in tensor.codecs]
    assert {option.lossless for option in options} == {True, False}
    assert all((option.error > 0) != option.lossless for option in options)
