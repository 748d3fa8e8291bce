"""Errors, extreme values and the reference of the row-wise codecs on compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxhybrid.codecs import Codec, TensorMeta
from fxhybrid.codecs.rowwise_compiled import CompiledRowwise, ReferenceRowwise

ROW = 64
BITS = pytest.mark.parametrize("bits", [8, 4, 2])


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    qdata, header = codec.encode(x)
    return codec.decode(qdata, header, TensorMeta.of(x))


def codec_pair(bits: int) -> tuple[Codec, Codec]:
    return CompiledRowwise(bits, ROW), ReferenceRowwise(bits, ROW)


def error_bound(x: Tensor, bits: int) -> Tensor:
    """Largest error allowed in each row of x [rows, ROW]: half a step, and float32 rounding of the row's values."""
    x = x.double()
    width, offset = x.amax(1) - x.amin(1), x.abs().amax(1)
    bound: Tensor = 0.501 / (2**bits - 1) * width + 1e-6 * offset
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
@pytest.mark.parametrize("row", [8, 24, 64, 200, 776])  # rows of 4 to 194 bytes at 4 bits: single bytes, vectors, both
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_compiled_kernels_and_reference_make_the_same_bytes(
    bits: int, dtype: torch.dtype, row: int, scale: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(50, row) * scale).to(dtype)
    x[0], x[1], x[2, 3], x[3, 0] = 0, 1, math.nan, -math.inf
    fast, reference, meta = CompiledRowwise(bits, row), ReferenceRowwise(bits, row), TensorMeta.of(x)
    (qdata, header), (reference_qdata, reference_header) = fast.encode(x), reference.encode(x)
    assert torch.equal(qdata, reference_qdata)
    assert torch.equal(header, reference_header)
    decoded, again = fast.decode(qdata, header, meta), reference.decode(qdata, header, meta)
    torch.testing.assert_close(decoded, again, rtol=0, atol=0, equal_nan=True)


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
        assert decoded[64:70].isfinite().all() == (place != 77)  # other rows are left alone


@BITS
def test_infinities_of_both_signs_and_many_nan(bits: int) -> None:
    x = torch.randn(10, ROW)
    x[3, 3], x[4, 4] = math.inf, -math.inf
    x[5, :32] = math.nan
    for codec in codec_pair(bits):
        assert round_trip(codec, x).isnan().any(1).tolist() == [False] * 3 + [True] * 3 + [False] * 4


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
    decoded = round_trip(CompiledRowwise(4, ROW), x)
    assert decoded.isfinite().all()
    assert relative_error(decoded[8:], x[8:]) < USUAL_ERROR[4]


@BITS
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e5, 1e6, 1e7, -3e7])
def test_rows_far_from_zero_keep_what_float32_holds(bits: int, offset: float) -> None:
    """At 1e7 neighbours are 1 apart: rows have two to seven different values, and codes must not leave their bits."""
    torch.manual_seed(0)
    x = offset + torch.randn(40, ROW)
    for codec in codec_pair(bits):
        error = (round_trip(codec, x).double() - x.double()).abs().amax(1)
        width, ulp = x.amax(1).double() - x.amin(1).double(), abs(offset) * 2.0**-23
        assert (error <= 0.501 / (2**bits - 1) * width + 2 * ulp).all()


def test_the_tail_is_exact() -> None:
    x = torch.randn(2 * ROW + 5)
    decoded = round_trip(CompiledRowwise(2, ROW), x)
    assert torch.equal(decoded[2 * ROW :], x[2 * ROW :])
    assert not torch.equal(decoded[: 2 * ROW], x[: 2 * ROW])
