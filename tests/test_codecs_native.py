"""Building the compiled kernels: by many processes at once, and not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxhybrid.codecs.kernels import cpu as native
from fxhybrid.codecs.kernels.cpu import native_kernels
from fxhybrid.codecs.kernels.protocol import kernels_for
from fxhybrid.codecs.rowwise import Rowwise
from tests.codec_parts import USUAL_ERROR, relative_error, round_trip

SAY_KEY = "from fxhybrid.codecs.kernels.cpu import kernels_key; print(kernels_key())"


def started(cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen([sys.executable, "-c", SAY_KEY], env=variables, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_processes_that_build_at_once_end_with_one_library(tmp_path: Path) -> None:
    processes = [started(tmp_path) for _ in range(3)]
    keys = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    files = [path.name for path in (tmp_path / "fxhybrid").iterdir()]
    assert {f"{key}.so" for key in keys} == set(files)
    assert len(files) == 1


def test_without_a_working_compiler_plain_aten_serves(tmp_path: Path) -> None:
    process = started(tmp_path, CXX="false")
    assert process.communicate()[0].strip() == "aten"
    assert process.returncode == 0


def test_compiled_kernels_serve_the_cpu_only() -> None:
    assert kernels_for(torch.device("meta")) is None
    assert kernels_for(torch.device("cpu")) is native_kernels()


@pytest.fixture
def fresh_kernels(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The look for kernels, repeated in an empty cache, and again after the test."""
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
def test_without_a_compiler_rows_are_packed_by_plain_aten(fresh_kernels: pytest.MonkeyPatch, compiler: str) -> None:
    fresh_kernels.setenv("CXX", compiler)  # one that fails, one that is missing, one that cannot be read
    assert native_kernels() is None
    assert native.kernels_key() == "aten"
    x = torch.randn(9, 64)
    assert Rowwise(4, 64).kernels_key == "aten"
    assert relative_error(round_trip(Rowwise(4, 64), x), x) < USUAL_ERROR[4]


def test_a_cache_that_cannot_be_written_is_no_error(
    fresh_kernels: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("cache") / "file"
    file.touch()
    fresh_kernels.setenv("XDG_CACHE_HOME", str(file))  # a file where the folder should be
    assert native_kernels() is None
