"""The channel-wise codec: widths, extremes and the reference; and the best widths against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxhybrid.codecs import (
    Codec,
    TensorMeta,
    assign_widths,
    channel_weights,
    channels_per_row,
    channelwise,
    get_codec,
)
from fxhybrid.codecs.widths import STEP_ERROR
from fxhybrid.errors import CodecError


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    qdata, header = codec.encode(x)
    return codec.decode(qdata, header, TensorMeta.of(x))


@contextmanager
def plain_aten() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channelwise, "kernels_for", lambda device: None)
        yield


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("spec", ["channelwise:848242", "channelwise:824"])
def test_makes_the_bytes_of_its_reference(scale: float, spec: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 7, 7) * torch.logspace(-6, 0, 49).view(7, 7) * scale
    codec, meta = get_codec(spec), TensorMeta.of(x)
    qdata, header = codec.encode(x)
    decoded = codec.decode(qdata, header, meta)
    with plain_aten():
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
    with plain_aten():
        assert not round_trip(get_codec("channelwise:842"), x).view(-1)[place].isfinite()


def test_channelwise_gives_each_channel_its_own_width() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 14, 14)
    decoded = round_trip(get_codec("channelwise:482"), x)
    for channel, width in enumerate((4, 8, 2)):
        plane = x[:, channel].contiguous()
        assert torch.equal(decoded[:, channel], round_trip(get_codec(f"rowwise{width}:196"), plane))
    # 4 samples x 196 elements x (4 + 8 + 2) bits, and 8 bytes for each of 12 rows
    assert get_codec("channelwise:482").encoded_bytes(TensorMeta.of(x)) == (4 * 196 * 14 // 8, 96)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=6),
    st.sampled_from([{2: 13, 4: 25, 8: 49}, {2: 49, 4: 98, 8: 196}, {2: 1, 4: 3, 8: 4}]),
    st.floats(0, 1),
)
def test_widths_are_the_best_of_all(weights: list[float], row_bytes: dict[int, int], share: float) -> None:
    n = len(weights)
    total = int(n * (row_bytes[2] + share * (row_bytes[8] - row_bytes[2])))

    def error(widths: tuple[int, ...]) -> float:
        return sum(v * STEP_ERROR[w] for v, w in zip(weights, widths, strict=True))

    found = assign_widths(weights, row_bytes, total)
    assert sum(row_bytes[w] for w in found) <= total
    fitting = [w for w in itertools.product((2, 4, 8), repeat=n) if sum(row_bytes[k] for k in w) <= total]
    assert error(found) == pytest.approx(min(map(error, fitting)), abs=1e-12)


def test_widths_that_cannot_fit_are_an_error() -> None:
    with pytest.raises(CodecError, match="3 channels take 30 bytes at 2 bits each, more than 29"):
        assign_widths([1, 2, 3], {2: 10, 4: 20, 8: 40}, 29)


def test_widths_beat_uniform_4_bits_at_equal_bytes() -> None:
    """Channels of scales 1, 1/2, 1/4, ... 1/128: a few carry nearly all of the error."""
    torch.manual_seed(0)
    x = torch.randn(16, 8, 8, 8) * 0.5 ** torch.arange(8).view(8, 1, 1)
    widths = assign_widths(channel_weights(x), {2: 16, 4: 32, 8: 64}, 8 * 32)
    mixed, uniform = get_codec("channelwise:" + "".join(map(str, widths))), get_codec("rowwise4:64")
    assert sum(mixed.encoded_bytes(TensorMeta.of(x))) <= sum(uniform.encoded_bytes(TensorMeta.of(x)))
    assert (round_trip(mixed, x) - x).norm() < 0.4 * (round_trip(uniform, x) - x).norm()


def test_channel_weights_are_mean_squared_ranges() -> None:
    x = torch.zeros(2, 2, 2, 2)
    x[0, 0, 0, 0], x[1, 0, 1, 1], x[1, 1, 0, 1] = 2, -4, 3
    assert channel_weights(x) == ((4 + 16) / 2, 9 / 2)


def test_neighbouring_channels_form_rows_where_planes_are_small() -> None:
    """Rows of 128 elements or more, in whole bytes at 2 bits: 4 x 49 = 196; 3 of 12 channels would be 147."""
    assert channels_per_row(64, 28 * 28) == 1
    assert channels_per_row(64, 49) == 4
    assert channels_per_row(12, 49) == 4
    assert channels_per_row(3, 49) == 1  # 147 elements are no whole bytes
    x = torch.randn(2, 8, 7, 7)
    assert torch.equal(round_trip(get_codec("channelwise:44"), x), round_trip(get_codec("rowwise4:196"), x))
    assert len(channel_weights(x, 4)) == 2
