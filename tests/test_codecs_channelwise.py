"""The channel-wise codec: widths, extremes and the reference; and the best widths against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.accuracy.channel_widths import channelwise_specs
from fxhybrid.codecs import TensorMeta, bisect_multiplier, channels_per_row, channelwise, get_codec, widths_at
from fxhybrid.codecs.rowwise import Rowwise
from fxhybrid.codecs.widths import STEP_ERROR
from tests.codec_parts import SAME_BYTES, plain_aten, round_trip


@SAME_BYTES
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("spec", ["channelwise:848242", "channelwise:824"])
def test_makes_the_bytes_of_its_reference(scale: float, spec: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 7, 7) * torch.logspace(-6, 0, 49).view(7, 7) * scale
    codec, meta = get_codec(spec), TensorMeta.of(x)
    qdata, header = codec.encode(x)
    decoded = codec.decode(qdata, header, meta)
    with plain_aten(channelwise):
        again = codec.encode(x)
        assert torch.equal(again[0], qdata)
        assert torch.equal(again[1], header)
        assert torch.equal(codec.decode(qdata, header, meta), decoded)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100, 2 * 3 * 49 - 1])
def test_non_finite_stays_non_finite(bad: float, place: int) -> None:
    x = torch.randn(2, 3, 7, 7)
    x.view(-1)[place] = bad
    assert not round_trip(get_codec("channelwise:842"), x).view(-1)[place].isfinite()
    with plain_aten(channelwise):
        assert not round_trip(get_codec("channelwise:842"), x).view(-1)[place].isfinite()


def test_channelwise_gives_each_channel_its_own_width() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 14, 14)
    decoded = round_trip(get_codec("channelwise:482"), x)
    for channel, width in enumerate((4, 8, 2)):
        plane = x[:, channel].contiguous()
        assert torch.equal(decoded[:, channel], round_trip(Rowwise(width, 196), plane))
    # 4 samples x 196 elements x (4 + 8 + 2) bits, and 8 bytes for each of 12 rows
    assert get_codec("channelwise:482").encoded_bytes(TensorMeta.of(x)) == (4 * 196 * 14 // 8, 96)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(1e-3, 100), min_size=1, max_size=6),
    st.sampled_from([{2: 13, 4: 25, 8: 49}, {2: 49, 4: 98, 8: 196}, {2: 1, 4: 3, 8: 4}]),
    st.floats(1e-6, 1.0),
)
def test_widths_at_a_multiplier_are_the_best_for_their_bytes(
    errors: list[float], row_bytes: dict[int, int], multiplier: float
) -> None:
    def error(widths: tuple[int, ...]) -> float:
        return sum(225 * v * STEP_ERROR[w] for v, w in zip(errors, widths, strict=True))

    found = widths_at(multiplier, torch.tensor(errors, dtype=torch.float64), row_bytes)
    total = sum(row_bytes[w] for w in found)
    every = itertools.product((2, 4, 8), repeat=len(errors))
    assert error(found) <= min(error(w) for w in every if sum(row_bytes[k] for k in w) <= total) * (1 + 1e-9)


def test_the_lowest_multiplier_at_which_bytes_fit() -> None:
    """200 bytes below a multiplier of 1e-9, 100 from there to 1e-3, then 50."""

    def n_bytes(multiplier: float) -> int:
        return 200 if multiplier < 1e-9 else 100 if multiplier < 1e-3 else 50

    assert bisect_multiplier(n_bytes, 100) == pytest.approx(1e-9)
    assert bisect_multiplier(n_bytes, 99) == pytest.approx(1e-3)
    assert bisect_multiplier(n_bytes, 49) is None


def test_widths_beat_uniform_4_bits_at_equal_bytes() -> None:
    """Channels of scales 1, 1/2, 1/4, ... 1/128: a few carry nearly all of the error."""
    torch.manual_seed(0)
    x = torch.randn(16, 8, 8, 8) * 0.5 ** torch.arange(8).view(8, 1, 1)
    low, high = x.flatten(2).aminmax(dim=2)
    meta, four = TensorMeta.of(x), "rowwise4:64"
    spec = channelwise_specs({0: meta}, {0: (high - low).square().sum(0)}, {0: four})[0]
    mixed, uniform = get_codec(spec), get_codec(four)
    assert sum(mixed.encoded_bytes(meta)) <= sum(uniform.encoded_bytes(meta))
    assert (round_trip(mixed, x) - x).norm() < 0.4 * (round_trip(uniform, x) - x).norm()


def test_tensors_share_bytes_by_what_their_error_costs() -> None:
    """Equal tensors, one with a millionfold squared error: it gets 8 bits and the others pay for it with 2."""
    meta = TensorMeta((2, 4, 16, 16), (1024, 256, 16, 1), torch.float32)
    errors = {t: torch.full((4,), 1.0 if t == 0 else 1e-6, dtype=torch.float64) for t in range(3)}
    specs = channelwise_specs(dict.fromkeys(range(3), meta), errors, dict.fromkeys(range(3), "rowwise4:256"))
    assert specs == {0: "channelwise:8888", 1: "channelwise:2222", 2: "channelwise:2222"}  # 8 + 2 + 2 = 3 * 4


def test_one_measurement_stands_for_all_widths() -> None:
    assert get_codec("channelwise:88882").profiled_as() is get_codec("channelwise:48424")
    assert get_codec("rowwise4:64").profiled_as() is get_codec("rowwise4:64")


def test_neighbouring_channels_form_rows_where_planes_are_small() -> None:
    """Rows of 128 elements or more, in whole bytes at 2 bits: 4 x 49 = 196; 3 of 12 channels would be 147."""
    assert channels_per_row(64, 28 * 28) == 1
    assert channels_per_row(64, 49) == 4
    assert channels_per_row(12, 49) == 4
    assert channels_per_row(3, 49) == 1  # 147 elements are no whole bytes
    x = torch.randn(2, 8, 7, 7)
    assert torch.equal(round_trip(get_codec("channelwise:44"), x), round_trip(get_codec("rowwise4:196"), x))
