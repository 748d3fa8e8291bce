"""Errors, extreme values and the reference of the row-wise codecs on the library's kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxhybrid.codecs import Codec, TensorMeta, rowwise_library
from fxhybrid.codecs.rowwise_library import LibraryRowwise, ReferenceLibraryRowwise

ROW = 64
BITS = pytest.mark.parametrize("bits", [8, 4, 2])
# How far float16 is off: half a unit in the last place, relative, and the smallest subnormal.
HALF_EPS, HALF_TINY = 2.0**-11, 2.0**-24


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    qdata, header = codec.encode(x)
    return codec.decode(qdata, header, TensorMeta.of(x))


def codec_pair(bits: int) -> tuple[Codec, Codec]:
    return LibraryRowwise(bits, ROW), ReferenceLibraryRowwise(bits, ROW)


def error_bound(x: Tensor, bits: int) -> Tensor:
    """Largest error allowed in each row of x [rows, ROW], in units of plain float32 rows.

    Half a step; float16 rounding of the bias moves every value by |bias| * 2^-11 and may clip as much;
    rounding of the scale grows with the code, at most range * 2^-11; 1e-8 is the library's epsilon.
    """
    x = x.double()
    width, offset = x.amax(1) - x.amin(1), x.abs().amax(1)
    if bits == 8:
        slack = 1e-8 + 1e-6 * offset
    else:
        slack = 2 * HALF_EPS * (offset + width) + 2**bits * HALF_TINY
    bound: Tensor = 0.51 / (2**bits - 1) * width + slack
    return bound


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([8, 4, 2]), st.floats(-2, 2), st.floats(0.5, 8))
def test_error_is_within_half_a_step(seed: int, bits: int, mean: float, std: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(7, ROW) * std + mean
    x[0] = mean  # a flat row
    for codec in codec_pair(bits):
        error = (round_trip(codec, x).double() - x.double()).abs().amax(1)
        assert (error <= error_bound(x, bits)).all()


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_library_and_reference_make_the_same_bytes(bits: int, dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(500, ROW) * scale).to(dtype)
    x[0], x[1] = 0, 1
    fast, reference = codec_pair(bits)
    (qdata, header), (reference_qdata, reference_header) = fast.encode(x), reference.encode(x)
    meta = TensorMeta.of(x)
    assert torch.equal(header, reference_header)
    if bits < 8:
        assert torch.equal(qdata, reference_qdata)
    # at 8 bits division by a rounded range may move a code by one at a tie; at all bits decoding may
    # round once (fused multiply-add) or twice
    differing = (qdata != reference_qdata).float().mean()
    assert differing < 1e-3
    largest = float(x.abs().max())
    decoded, again = fast.decode(qdata, header, meta), reference.decode(qdata, header, meta)
    slack = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-7
    torch.testing.assert_close(again, decoded, rtol=0, atol=2 * slack * largest)


@BITS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 77, 64 * 5 - 1, -1])
def test_non_finite_stays_non_finite(bits: int, bad: float, dtype: torch.dtype, place: int) -> None:
    x = torch.randn(64 * 5 + 9, dtype=dtype)
    x[place] = bad
    for codec in codec_pair(bits):
        decoded = round_trip(codec, x)
        assert not decoded[~x.isfinite()].isfinite().any()


@BITS
def test_infinities_of_both_signs_and_many_nan(bits: int) -> None:
    x = torch.randn(10, ROW)
    x[3, 3], x[4, 4] = math.inf, -math.inf
    for codec in codec_pair(bits):
        assert round_trip(codec, x).isnan().all()
        assert round_trip(codec, torch.full((4, ROW), math.nan)).isnan().all()


# Plain normal numbers at these bits are this far off (measured 0.0055, 0.093, 0.47).
USUAL_ERROR = {8: 0.007, 4: 0.12, 2: 0.6}


@BITS
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-8, 1e-5, 1e-3, 1.0, 1e3, 1e6, 1e18, 1e20, 1e30, 5e37])
def test_every_scale_has_the_usual_error(bits: int, scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, ROW) * scale
    for codec in codec_pair(bits):
        assert relative_error(round_trip(codec, x), x) < USUAL_ERROR[bits]
        assert relative_error(round_trip(codec, x.bfloat16()), x.bfloat16()) < USUAL_ERROR[bits]


@BITS
def test_softmax_outputs_are_packed_as_they_are(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.softmax(torch.randn(64, 4 * ROW) / 4, 1)  # about 1 / 256 each, all below 2^-6
    header = LibraryRowwise(bits, ROW).encode(x)[1]
    assert header[:8].view(torch.float32).tolist() == [1.0, 0.0]  # unit and shift: nothing done before packing


@BITS
@pytest.mark.parametrize("scale", [6e-5, 1e-2, 1e4])
def test_every_scale_of_float16_has_the_usual_error(bits: int, scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40, ROW) * scale).half()
    assert relative_error(round_trip(codec_pair(bits)[0], x), x) < USUAL_ERROR[bits]


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_and_smallest_values_stay_finite(bits: int, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for codec in codec_pair(bits):
        for values in ((-info.max, info.max), (info.max, 0), (info.tiny, 0), (info.smallest_normal / 4, 0)):
            x = torch.tensor(values, dtype=dtype).repeat(ROW)
            decoded = round_trip(codec, x)
            assert decoded.isfinite().all()
            assert relative_error(decoded, x) < 0.02


@BITS
def test_finite_tensor_with_an_overflowing_sum_is_not_poisoned(bits: int) -> None:
    x = torch.full((100, ROW), 3e38)
    x[:, ::2] = 2e38
    for codec in codec_pair(bits):
        assert relative_error(round_trip(codec, x), x) < 0.01


@BITS
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-8, 1.0, -3.3, 1000.3, 1e30])
def test_flat_tensors_come_back(bits: int, value: float) -> None:
    for codec in codec_pair(bits):
        x = torch.full((5, ROW), value)
        torch.testing.assert_close(round_trip(codec, x), x, rtol=2e-3, atol=0)


@BITS
@pytest.mark.parametrize("offset", [1000.0, -1e5, 1e-6])
def test_one_common_offset_costs_nothing(bits: int, offset: float) -> None:
    torch.manual_seed(0)
    x = offset + torch.randn(40, ROW) * abs(offset) * 1e-5
    for codec in codec_pair(bits):
        assert relative_error(round_trip(codec, x) - offset, x - offset) < 1.02 * USUAL_ERROR[bits]


def test_one_outlier_does_not_overflow_float16() -> None:
    x = torch.randn(2000, ROW)
    x[7, 7] = 1e6
    decoded = round_trip(LibraryRowwise(4, ROW), x)
    assert decoded.isfinite().all()
    assert relative_error(decoded[8:], x[8:]) < USUAL_ERROR[4]


def test_the_usual_tensor_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Codec, body: Tensor) -> None:
        raise AssertionError("the slow exact look was taken")

    monkeypatch.setattr(LibraryRowwise, "_find_transform", fail)
    for x in (torch.randn(50, ROW), torch.randn(50, ROW).relu(), torch.rand(50, ROW) * 6, torch.eye(ROW)):
        for bits in (8, 4, 2):
            LibraryRowwise(bits, ROW).encode(x)


def test_the_tail_is_exact() -> None:
    x = torch.randn(2 * ROW + 5)
    decoded = round_trip(LibraryRowwise(2, ROW), x)
    assert torch.equal(decoded[2 * ROW :], x[2 * ROW :])
    assert not torch.equal(decoded[: 2 * ROW], x[: 2 * ROW])


def test_falls_back_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, ROW)
    expected = LibraryRowwise(4, ROW).encode(x)
    monkeypatch.setattr(rowwise_library, "library_kernels", lambda bits: None)
    found = LibraryRowwise(4, ROW).encode(x)
    assert torch.equal(found[0], expected[0])
