"""What row-wise codecs hold: extreme values, flat and far rows, the tail."""

from __future__ import annotations

import pytest
import torch

from fxhybrid.codecs import Codec
from fxhybrid.codecs.rowwise import Rowwise
from tests.codec_parts import BITS, ROW, USUAL_ERROR, ReferenceRowwise, relative_error, round_trip


def codec_pair(bits: int) -> tuple[Codec, Codec]:
    return Rowwise(bits, ROW), ReferenceRowwise(bits, ROW)


@BITS
@pytest.mark.parametrize("scale", [6e-5, 1e-2, 1e4])
def test_every_scale_of_float16_has_the_usual_error(bits: int, scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40, ROW) * scale).half()
    assert relative_error(round_trip(Rowwise(bits, ROW), x), x) < USUAL_ERROR[bits]


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
    decoded = round_trip(Rowwise(4, ROW), x)
    assert decoded.isfinite().all()
    assert relative_error(decoded[8:], x[8:]) < USUAL_ERROR[4]


def test_the_tail_is_exact() -> None:
    x = torch.randn(2 * ROW + 5)
    decoded = round_trip(Rowwise(2, ROW), x)
    assert torch.equal(decoded[2 * ROW :], x[2 * ROW :])
    assert not torch.equal(decoded[: 2 * ROW], x[: 2 * ROW])
