"""One conformance suite over every registered codec, then what is special about each lossless one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import max_pool2d

from fxhybrid.codecs import TensorMeta, get_codec, registered_names
from fxhybrid.errors import CodecError
from tests.codec_parts import round_trip


def floats(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape).to(dtype)


def bools(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.5


def pool_indices(*shape: int) -> Tensor:
    """Valid indices of a 3x3 pool, stride 2, padding 1, over 9 x 9 planes: shape must end in 5, 5."""
    x = torch.randn(*shape[:-2], 9, 9)
    return max_pool2d(x, 3, 2, 1, return_indices=True)[1]


POOL = "pool:3,3,2,2,1,1,1,1,9,9"
ROWWISE_SHAPES = [(4, 8, 16), (3, 5, 7, 7), (64,), (98,), (63,), (1,), (), (0,), (2, 0, 3), (3000, 701)]
ANY_SHAPES = [(2, 3, 8, 8), (3, 5, 7), (1,), (9,), (8,), (), (0, 4)]
POOL_SHAPES = [(2, 3, 5, 5), (4, 5, 5), (1, 1, 5, 5), (0, 3, 5, 5)]
CASES: list[tuple[str, Callable[..., Tensor], list[tuple[int, ...]]]] = [
    ("bitpack", bools, ANY_SHAPES),
    (POOL, pool_indices, POOL_SHAPES),
    ("rowwise8:64", floats(torch.float32), ROWWISE_SHAPES),
    ("rowwise4:64", floats(torch.bfloat16), ROWWISE_SHAPES),
    ("rowwise8:64", floats(torch.float16), ROWWISE_SHAPES),
    ("rowwise4:98", floats(torch.float32), ROWWISE_SHAPES),
    ("sqrt8:64", floats(torch.float32), ROWWISE_SHAPES),
    ("sqrt4:98", floats(torch.float32), ROWWISE_SHAPES),
    ("sqrt4:64", floats(torch.bfloat16), ROWWISE_SHAPES),
    ("channelwise:48248", floats(torch.float32), [(2, 5, 8, 8), (3, 5, 7, 7), (1, 5, 3), (0, 5, 4, 4), (2, 5, 0, 3)]),
    ("channelwise:824", floats(torch.float32), [(2, 6, 5, 5), (3, 12, 2, 1), (1, 3, 7)]),
]
FIXED_SHAPE = (POOL, "channelwise:48248", "channelwise:824")  # do not take every shape
INPUTS = [
    pytest.param(spec, make, shape, id=f"{spec}-{make(*shape).dtype}-{'x'.join(map(str, shape))}")
    for spec, make, shapes in CASES
    for shape in shapes
]


def layouts(x: Tensor) -> list[Tensor]:
    """The same values in every kind of dense layout, and as a part of a larger storage."""
    found = [x, torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape)]
    if x.dim() >= 2:
        reverse = list(range(x.dim()))[::-1]
        found.append(x.permute(reverse).contiguous().permute(reverse))
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
    return found


def test_every_registered_codec_is_in_the_suite() -> None:
    assert {spec.partition(":")[0] for spec, _, _ in CASES} == set(registered_names())


@pytest.mark.parametrize(("spec", "make", "shape"), INPUTS)
def test_conforms(spec: str, make: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    codec = get_codec(spec)
    assert codec.spec == spec
    for x in layouts(make(*shape)):
        meta, before = TensorMeta.of(x), x.clone()
        if spec.startswith("channelwise:") and not x.is_contiguous():
            assert not codec.supports(meta)
            continue
        assert codec.supports(meta)
        qdata, header = torch.ops.fxhybrid.compress(x, spec)
        assert torch.equal(x, before)
        for part, n_bytes in zip((qdata, header), codec.encoded_bytes(meta), strict=True):
            assert part.dtype == torch.uint8
            assert part.shape == (n_bytes,)
            assert part.untyped_storage().nbytes() == n_bytes
            assert n_bytes == 0 or part.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        arguments = (qdata, header, spec, meta.shape, meta.stride, meta.dtype)
        decoded = torch.ops.fxhybrid.decompress(*arguments)
        assert TensorMeta.of(decoded) == meta
        assert decoded.untyped_storage().nbytes() == meta.nbytes
        if codec.lossless:
            assert torch.equal(decoded, x)
        again = codec.encode(x)
        assert torch.equal(again[0], qdata)
        assert torch.equal(again[1], header)
        assert torch.equal(codec.decode(qdata, header, meta), decoded)
        check_fakes(x, arguments)


def check_fakes(x: Tensor, arguments: tuple[object, ...]) -> None:
    qdata, header, spec, *rest = arguments
    with FakeTensorMode() as mode:
        fakes = torch.ops.fxhybrid.compress(mode.from_tensor(x), spec)
        fake_decoded = torch.ops.fxhybrid.decompress(*fakes, spec, *rest)
    for fake, real in zip(fakes, (qdata, header), strict=True):
        assert isinstance(real, Tensor)
        assert TensorMeta.of(fake) == TensorMeta.of(real)
        assert fake.untyped_storage().nbytes() == real.untyped_storage().nbytes()
    assert TensorMeta.of(fake_decoded) == TensorMeta.of(x)
    assert fake_decoded.untyped_storage().nbytes() == TensorMeta.of(x).nbytes


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "make", "shape"), INPUTS)
def test_cuda_writes_what_the_cpu_reads(spec: str, make: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    codec, x = get_codec(spec), make(*shape)
    meta = TensorMeta.of(x)
    qdata, header = codec.encode(x.cuda())
    assert (qdata.numel(), header.numel()) == codec.encoded_bytes(meta)
    there, here = codec.decode(qdata, header, meta), codec.decode(qdata.cpu(), header.cpu(), meta)
    torch.testing.assert_close(there.cpu(), here, equal_nan=True)


@pytest.mark.parametrize(("spec", "make", "shapes"), CASES)
def test_operators_pass_opcheck(spec: str, make: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    x = make(*shapes[0])
    torch.library.opcheck(torch.ops.fxhybrid.compress.default, (x, spec))
    encoded = get_codec(spec).encode(x)
    rest = (spec, list(x.shape), list(x.stride()), x.dtype)
    torch.library.opcheck(torch.ops.fxhybrid.decompress.default, (*encoded, *rest))


@pytest.mark.parametrize(("spec", "make", "shapes"), CASES)
def test_refuses_what_it_does_not_support(
    spec: str, make: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    codec = get_codec(spec)
    gaps = torch.zeros(8, 5, 5, dtype=make(*shapes[0]).dtype)[::2]
    overlapping = gaps[:1].expand(4, 5, 5)
    for x in (gaps, overlapping, torch.zeros(64, 5, 5, dtype=torch.complex64)):
        assert not codec.supports(TensorMeta.of(x))
        with pytest.raises(CodecError, match="cannot encode"):
            codec.encode(x)
    good = make(*shapes[0])
    qdata, header = codec.encode(good)
    with pytest.raises(CodecError, match="is encoded in"):
        codec.decode(qdata[1:], header, TensorMeta.of(good))


@pytest.mark.parametrize(
    "spec", [spec for spec, _, _ in CASES if not get_codec(spec).lossless and spec != "channelwise:824"]
)
def test_noise_is_that_of_ordinary_data(spec: str) -> None:
    """Decoding errors on normal numbers of one scale, against 4 bits a row: within a factor of 1.5 of the claim."""
    torch.manual_seed(0)
    x = torch.randn(32, 5, 14, 14)
    codec = get_codec(spec)
    found = (round_trip(codec, x) - x).norm() / (round_trip(get_codec("rowwise4:196"), x) - x).norm()
    assert codec.noise / 1.5 <= found <= codec.noise * 1.5


def test_compress_of_a_tensor_that_requires_grad_records_nothing() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    qdata, header = torch.ops.fxhybrid.compress(x, "rowwise8:64")
    decoded = get_codec("rowwise8:64").decode(qdata, header, TensorMeta.of(x))
    assert decoded.grad_fn is None
    assert qdata.grad_fn is None


def test_dense_means_no_gaps_and_no_overlaps() -> None:
    def dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
        return TensorMeta(shape, stride, torch.float32).is_dense

    assert dense((), ())
    assert dense((2, 3), (3, 1))
    assert dense((2, 3), (1, 2))
    assert dense((2, 1, 3), (3, 77, 1))
    assert dense((2, 0), (5, 5))
    assert not dense((2, 3), (4, 1))
    assert not dense((2, 3), (0, 1))
    assert not dense((2, 3), (1, 1))
    assert not dense((2, 3), (1,))


@st.composite
def dense_shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    return shape, draw(st.permutations(range(len(shape))))


def permuted(x: Tensor, order: list[int]) -> Tensor:
    """x with its dimensions laid out in this order in storage."""
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])


@settings(max_examples=60, deadline=None)
@given(dense_shapes(), st.integers(0, 2**31), st.sampled_from([case for case in CASES if case[0] not in FIXED_SHAPE]))
def test_any_dense_layout_round_trips(
    layout: tuple[list[int], list[int]], seed: int, case: tuple[str, Callable[..., Tensor], object]
) -> None:
    torch.manual_seed(seed)
    spec, make, _ = case
    x = permuted(make(*layout[0]), layout[1])
    decoded = round_trip(get_codec(spec), x)
    assert TensorMeta.of(decoded) == TensorMeta.of(x)
    if get_codec(spec).lossless:
        assert torch.equal(decoded, x)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pool_indices_round_trip(data: st.DataObject) -> None:
    small = st.integers(1, 4)
    kernel, stride, dilation = (data.draw(st.tuples(small, small)) for _ in range(3))
    padding = tuple(data.draw(st.integers(0, size // 2)) for size in kernel)
    plane = [data.draw(st.integers((k - 1) * d + 1, 20)) for k, d in zip(kernel, dilation, strict=True)]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randint(0, 3, (2, 3, *plane)).float()  # many ties
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    ceil_mode = data.draw(st.booleans())
    _, indices = max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    values = (*kernel, *stride, *padding, *dilation, *plane)
    codec = get_codec("pool:" + ",".join(map(str, values)))
    for layout in layouts(indices):
        assert torch.equal(round_trip(codec, layout), indices)


def test_pool_takes_nan_and_minus_infinity() -> None:
    x = torch.full((1, 2, 9, 9), -torch.inf)
    x[0, 1, 4, 4] = torch.nan
    _, indices = max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(round_trip(get_codec(POOL), indices), indices)
