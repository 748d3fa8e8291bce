"""Building the compiled kernels: by many processes at once, and not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
