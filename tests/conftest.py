"""What every test starts from: one thread, a fixed seed, and operator timings in a folder of this run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxhybrid.compiler.pending_calls import pending_calls

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

torch.set_num_threads(1)  # test processes run side by side, one a core

sys.path[:0] = [str(Path(__file__).parent)]  # test files import their helpers by bare name or as tests.*


@pytest.fixture(scope="session", autouse=True)
def profile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the profile cache out of the user's home."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Keeps what earlier files left behind out of the garbage collections that each measured step makes."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets the interpreter clear its heap: libraries report what is left at exit as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_kept_plans(profile_cache: None) -> None:
    """Each test plans for itself: what one test learnt must not spare another its checks."""
    for record in (Path(os.environ["XDG_CACHE_HOME"]) / "fxhybrid").glob("plans-*.json"):
        record.unlink()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same weights and data in every run."""
    torch.manual_seed(0)


@pytest.fixture
def nothing_pending() -> Iterator[None]:
    """No call is entered as pending before or after the test."""
    gc.collect()
    assert not pending_calls()
    yield
    gc.collect()
    assert not pending_calls(), "a call is entered although its graph is gone"
