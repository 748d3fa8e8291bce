"""Casts to bfloat16 and fp8: errors, extremes and the reference; and what happens without a compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxhybrid.codecs import TensorMeta, casts, get_codec, rowwise_compiled
from fxhybrid.codecs.kernels import cpu as native
from fxhybrid.codecs.kernels.cpu import native_kernels
from fxhybrid.codecs.kernels.protocol import kernels_for
from fxhybrid.codecs.rowwise_library import LibraryRowwise
from tests.codec_parts import plain_aten, round_trip

BLOCK = 4096


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.floats(-30, 30))
def test_fp8_error_is_within_half_a_step(seed: int, n: int, exponent: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(n) * 10**exponent
    error, largest = (round_trip(get_codec("fp8"), x) - x).abs(), x.abs().max()
    assert (error <= torch.maximum(x.abs() * 2.0**-4, largest * 2.0**-17) * 1.0001).all()


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e30, 3.4e38])
@pytest.mark.parametrize("n", [1, 15, 16, 777, 70_001])  # the last one: 17 blocks and a short one
def test_fp8_makes_the_bytes_of_its_reference(scale: float, n: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(n).clamp_(-1, 1) * torch.logspace(-6, 0, n) * scale
    codec, meta = get_codec("fp8"), TensorMeta.of(x)
    qdata, header = codec.encode(x)
    decoded = codec.decode(qdata, header, meta)
    assert decoded.isfinite().all()
    with plain_aten(casts):
        again = codec.encode(x)
        assert torch.equal(again[0], qdata)
        assert torch.equal(again[1], header)
        assert torch.equal(codec.decode(qdata, header, meta), decoded)


def test_fp8_takes_every_exact_value() -> None:
    """All finite e4m3 values below 256 times 2^-20, beside some that fix the unit, come back."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = codes[codes.abs() < 256] * 2.0**-20
    assert torch.equal(round_trip(get_codec("fp8"), x), x)
    with plain_aten(casts):
        assert torch.equal(round_trip(get_codec("fp8"), x), x)


def test_each_block_of_fp8_has_its_own_unit() -> None:
    """A block of values 2^-40 times the other's keeps its relative error; the other's NaN stays there."""
    torch.manual_seed(0)
    x = torch.randn(2 * BLOCK)
    x[BLOCK:] *= 2.0**-40
    small, error = x[BLOCK:], (round_trip(get_codec("fp8"), x) - x)[BLOCK:]
    assert error.norm() < 0.03 * small.norm()
    x[7] = math.nan
    assert round_trip(get_codec("fp8"), x).isnan().nonzero().flatten().tolist() == list(range(BLOCK))


@pytest.mark.parametrize("spec", ["fp8", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100, 293])
def test_non_finite_stays_non_finite(spec: str, bad: float, place: int) -> None:
    x = torch.randn(294)
    x[place] = bad
    assert not round_trip(get_codec(spec), x)[place].isfinite()
    with plain_aten(casts):
        assert not round_trip(get_codec(spec), x)[place].isfinite()


def test_bf16_rounds_like_a_cast() -> None:
    x = torch.randint(-(2**31), 2**31, (100_003,), dtype=torch.int32).view(torch.float32)  # any bits, NaN too
    expected = x.bfloat16().float()
    torch.testing.assert_close(round_trip(get_codec("bf16"), x), expected, rtol=0, atol=0, equal_nan=True)
    with plain_aten(casts):
        assert torch.equal(get_codec("bf16").encode(x[:9])[0], x[:9].bfloat16().view(torch.uint8))


def test_compiled_kernels_serve_the_cpu_only() -> None:
    assert kernels_for(torch.device("meta")) is None
    assert kernels_for(torch.device("cpu")) is native_kernels()


@pytest.fixture
def fresh_kernels(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The look for kernels made anew in an empty cache, and again after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_kernels.cache_clear()
    yield monkeypatch
    native_kernels.cache_clear()


def test_a_second_process_finds_the_library_built(fresh_kernels: pytest.MonkeyPatch) -> None:
    if native_kernels() is None:
        pytest.skip("no C++ compiler here")
    key = native.kernels_key()
    native_kernels.cache_clear()

    def no_build(*arguments: object) -> None:
        raise AssertionError("built again")

    fresh_kernels.setattr(native, "_build", no_build)
    assert native_kernels() is not None
    assert native.kernels_key() == key


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler", "'"])
def test_without_a_compiler_the_library_serves(fresh_kernels: pytest.MonkeyPatch, compiler: str) -> None:
    fresh_kernels.setenv("CXX", compiler)  # one that fails, one that is missing, one that cannot be read
    assert native_kernels() is None
    assert native.kernels_key() == "aten"
    codec = rowwise_compiled.make_rowwise(4, 64)
    assert isinstance(codec, LibraryRowwise)
    assert codec.kernels_key == "library"


def test_a_cache_that_cannot_be_written_is_no_error(
    fresh_kernels: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("cache") / "file"
    file.touch()
    fresh_kernels.setenv("XDG_CACHE_HOME", str(file))  # a file where the folder should be
    assert native_kernels() is None
