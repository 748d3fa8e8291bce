"""Errors, extreme values and the reference of the row-wise codecs on compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxhybrid.codecs import Codec, TensorMeta
from fxhybrid.codecs.kernels import reference
from fxhybrid.codecs.rowwise import Rowwise
from fxhybrid.profiling.allocator import memory_rise
from tests.codec_parts import BITS, ROW, SAME_BYTES, SQRT, USUAL_ERROR, ReferenceRowwise, relative_error, round_trip


def codec_pair(bits: int, sqrt: bool = False) -> tuple[Codec, Codec]:
    return Rowwise(bits, ROW, sqrt), ReferenceRowwise(bits, ROW, sqrt)


def error_bound(x: Tensor, bits: int) -> Tensor:
    """Largest error allowed in each row of x [rows, ROW]: half a step, and float32 rounding of the row's values."""
    x = x.double()
    width, offset = x.amax(1) - x.amin(1), x.abs().amax(1)
    bound: Tensor = 0.501 / (2**bits - 1) * width + 1e-6 * offset
    return bound


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([8, 4, 2]), st.floats(-2, 2), st.floats(0.5, 8))
def test_error_is_within_half_a_step(seed: int, bits: int, mean: float, std: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(7, ROW) * std + mean
    x[0] = mean  # a flat row
    for codec in codec_pair(bits):
        error = (round_trip(codec, x).double() - x.double()).abs().amax(1)
        assert (error <= error_bound(x, bits)).all()


@SAME_BYTES
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [8, 24, 64, 200, 776])  # rows of 4 to 194 bytes at 4 bits: single bytes, vectors, both
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@SQRT
def test_compiled_kernels_and_reference_make_the_same_bytes(
    bits: int, sqrt: bool, dtype: torch.dtype, row: int, scale: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(50, row) * scale).to(dtype)
    x[0], x[1], x[2, 3], x[3, 0], x[4] = 0, 1, math.nan, -math.inf, x[4].abs().softmax(0)
    x[5:9], x[5:9, 1::3] = x[5:9].abs(), -0.0  # no negative elements, but signs
    if sqrt:  # which takes both for the same; else either may be a row's lowest value
        x[5:7, 2::3] = 0.0
    fast, reference, meta = Rowwise(bits, row, sqrt), ReferenceRowwise(bits, row, sqrt), TensorMeta.of(x)
    (qdata, header), (reference_qdata, reference_header) = fast.encode(x), reference.encode(x)
    assert torch.equal(qdata, reference_qdata)
    assert torch.equal(header, reference_header)
    decoded, again = fast.decode(qdata, header, meta), reference.decode(qdata, header, meta)
    torch.testing.assert_close(decoded, again, rtol=0, atol=0, equal_nan=True)


@BITS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 77, 64 * 5 - 1, -1])
@SQRT
def test_non_finite_stays_non_finite(bits: int, sqrt: bool, bad: float, dtype: torch.dtype, place: int) -> None:
    x = torch.randn(64 * 5 + 9, dtype=dtype)
    x[place] = bad
    for codec in codec_pair(bits, sqrt):
        decoded = round_trip(codec, x)
        assert not decoded[~x.isfinite()].isfinite().any()
        assert decoded[64:70].isfinite().all() == (place != 77)  # other rows are left alone


@BITS
@SQRT
def test_infinities_of_both_signs_and_many_nan(bits: int, sqrt: bool) -> None:
    x = torch.randn(10, ROW)
    x[3, 3], x[4, 4] = math.inf, -math.inf
    x[5, :32] = math.nan
    for codec in codec_pair(bits, sqrt):
        assert round_trip(codec, x).isnan().any(1).tolist() == [False] * 3 + [True] * 3 + [False] * 4


# Plain normal numbers at these bits are this far off (measured 0.0055, 0.093, 0.47).
@BITS
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-8, 1e-5, 1e-3, 1.0, 1e3, 1e6, 1e18, 1e20, 1e30, 5e37])
def test_every_scale_has_the_usual_error(bits: int, scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, ROW) * scale
    for codec in codec_pair(bits):
        assert relative_error(round_trip(codec, x), x) < USUAL_ERROR[bits]
        assert relative_error(round_trip(codec, x.bfloat16()), x.bfloat16()) < USUAL_ERROR[bits]


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


@BITS
@SQRT
def test_plain_aten_takes_the_same_memory_whatever_the_rows_are(bits: int, sqrt: bool) -> None:
    """Its rise is measured on made-up data, so flat rows, as of even attention, must not take more."""
    codec, x = ReferenceRowwise(bits, ROW, sqrt), torch.randn(1000, ROW)
    flat = torch.full_like(x, 1 / ROW)
    rises = [memory_rise(lambda rows=rows: codec.encode(rows)).peak_rise_bytes for rows in (x, flat)]
    assert rises[0] == rises[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([8, 4, 2]), st.floats(0, 30))
def test_companded_rows_are_within_half_a_step(seed: int, bits: int, sharpness: float) -> None:
    """A line's slope is the root's own times 1 / sqrt(2) or more, so a step there is below 4 sqrt(x) steps here."""
    torch.manual_seed(seed)
    x = torch.softmax(torch.randn(7, ROW) * sharpness, 1)
    for codec in codec_pair(bits, sqrt=True):
        error = (round_trip(codec, x).double() - x.double()).abs()
        step = reference.compand(x).amax(1, keepdim=True).double() / (2**bits - 1)
        largest = (x.double().sqrt() + step).square()  # what half a step up makes of x, at most
        assert (error <= 0.501 * step * 4 * largest.sqrt() + 1e-6 * x).all()


def test_companding_is_straight_between_powers_of_two_and_undone_to_the_bit() -> None:
    x = torch.tensor([0.0, 0.25, 1.0, 1.5, 2.0, 3.0, 4.0, 16.0, -4.0, 3.4e38, 1e-45])
    expected = torch.tensor([1.5 * 2.0**-64, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 4.0, -2.0])
    assert torch.equal(reference.compand(x)[:9], expected)
    torch.testing.assert_close(reference.expand(reference.compand(x)), x, rtol=2.0**-23, atol=2e-45)


@BITS
def test_companding_keeps_zeros_among_weights(bits: int) -> None:
    x = torch.softmax(torch.randn(8, ROW), 1).tril_()
    x[0] = 0
    for codec in codec_pair(bits, sqrt=True):
        assert (round_trip(codec, x)[x == 0] == 0).all()


# Lines of 128 weights, the largest about 0.24. Rows: steps of 0.24 / 15 = 0.016 where most weights are below 0.008 and
# become 0. Companded: steps of 0.49 / 15 = 0.033, which at the weight of 0.008 are 2 * 0.09 * 0.033 = 0.006.
@pytest.mark.parametrize(("bits", "share"), [(8, 0.4), (4, 0.6)])
def test_companding_keeps_the_small_weights_of_attention(bits: int, share: float) -> None:
    torch.manual_seed(0)
    x = torch.softmax(2 * torch.randn(1000, 128), 1)
    plain, companded = (relative_error(round_trip(Rowwise(bits, 128, sqrt), x), x) for sqrt in (False, True))
    assert companded < share * plain
