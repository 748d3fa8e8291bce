"""The Triton kernels write and read the bytes of the reference; they run in Triton's interpreter where there is no GPU.

The interpreter rounds the product in ``tl.fma`` before it adds to it, and cuts float32 to bfloat16 instead of rounding
it, which no GPU does: here it is taught better. It has to be chosen before Triton is imported (``conftest.py``).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxhybrid.codecs import Codec, TensorMeta, channelwise, get_codec, rowwise
from fxhybrid.codecs.rowwise import Rowwise
from tests.codec_parts import BITS, SAME_BYTES, SQRT, plain_aten

pytestmark = SAME_BYTES
triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The codecs on Triton's kernels, and the device whose memory these work on."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from triton.runtime import interpreter

    from fxhybrid.codecs.kernels.cuda import TritonKernels

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(np.float32), x.dtype.scalar)

    def fp_trunc(self: Any, source: Any, to: Any) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[str(to.scalar)]
        rounded = torch.from_numpy(source.data).to(dtype).view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(interpreter._get_np_dtype(to)), to.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", fp_trunc)
    for module in (rowwise, channelwise):
        monkeypatch.setattr(module, "kernels_for", lambda device: TritonKernels())
    with np.errstate(all="ignore"):  # overflow is part of the formulas
        yield torch.device("cpu")


def check(codec: Codec, plain: Codec, x: Tensor, device: torch.device) -> None:
    """``codec`` makes and reads the very bytes that ``plain`` does without any kernels."""
    meta = TensorMeta.of(x)
    with plain_aten(rowwise), plain_aten(channelwise):
        expected = plain.encode(x)
        decoded = plain.decode(*expected, meta)
    found = codec.encode(x.to(device))
    for name, a, b in zip(("codes", "header"), found, expected, strict=True):
        assert torch.equal(a.cpu(), b), name
    again = codec.decode(*found, meta)
    assert TensorMeta.of(again) == meta
    torch.testing.assert_close(again.cpu(), decoded, rtol=0, atol=0, equal_nan=True)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [8, 200, 2056])  # less than a byte block, several parts, more than one block
@pytest.mark.parametrize("scale", [1e-3, 300.0])
@SQRT
def test_rows(on_triton: torch.device, bits: int, sqrt: bool, dtype: torch.dtype, row: int, scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(23, row) * scale).to(dtype)
    x[0], x[1], x[2, 3], x[3, 0] = 0, 1, math.nan, -math.inf
    flat = torch.cat([x.view(-1), x[5, :7]])  # the last row is not a whole one
    check(Rowwise(bits, row, sqrt), Rowwise(bits, row, sqrt), flat, on_triton)


@BITS
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-8, 1e18, 1e30, 5e37])
@pytest.mark.parametrize("offset", [0.0, 1e4, -3e7])
@SQRT
def test_rows_of_any_scale(on_triton: torch.device, bits: int, sqrt: bool, scale: float, offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 64) * scale + offset
    x[3, :4] = torch.tensor([3.4e38, -3.4e38, 0.0, 1.0])
    check(Rowwise(bits, 64, sqrt), Rowwise(bits, 64, sqrt), x, on_triton)


@pytest.mark.parametrize(("digits", "shape"), [("824", (5, 3, 7, 9)), ("4282", (3, 8, 5, 5)), ("28", (2, 2, 40, 32))])
def test_channels(on_triton: torch.device, digits: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[1]).view(-1, 1, 1)
    x[1, 1, 0, 0] = math.inf
    codec = get_codec(f"channelwise:{digits}")
    check(codec, codec, x, on_triton)


def test_empty(on_triton: torch.device) -> None:
    for spec, shape in (("rowwise4:64", (0,)), ("rowwise4:64", (5,)), ("channelwise:48", (0, 2, 3))):
        check(get_codec(spec), get_codec(spec), torch.ones(shape), on_triton)


def test_all_kernels_compile_for_a_gpu() -> None:
    """The interpreter runs what the compiler would refuse."""
    command = [sys.executable, "-m", "tests.triton_compile"]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 12
