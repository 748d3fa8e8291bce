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
from tests.codec_parts import BITS, ROW, USUAL_ERROR, relative_error, round_trip

# How far float16 is off: half a unit in the last place, relative, and the smallest subnormal.
HALF_EPS, HALF_TINY = 2.0**-11, 2.0**-24


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


def test_the_usual_tensor_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Codec, body: Tensor) -> None:
        raise AssertionError("the slow exact look was taken")

    monkeypatch.setattr(LibraryRowwise, "_find_transform", fail)
    for x in (torch.randn(50, ROW), torch.randn(50, ROW).relu(), torch.rand(50, ROW) * 6, torch.eye(ROW)):
        for bits in (8, 4, 2):
            LibraryRowwise(bits, ROW).encode(x)


def test_falls_back_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, ROW)
    expected = LibraryRowwise(4, ROW).encode(x)
    monkeypatch.setattr(rowwise_library, "library_kernels", lambda bits: None)
    found = LibraryRowwise(4, ROW).encode(x)
    assert torch.equal(found[0], expected[0])
