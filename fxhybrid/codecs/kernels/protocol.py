"""What compiled kernels can do, and which ones work on a device's memory."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from fxhybrid.codecs.kernels.cpu import kernels_key as native_key
from fxhybrid.codecs.kernels.cpu import native_kernels


class Kernels(Protocol):
    """Packs and unpacks rows on one kind of device, in tensors that the caller made, as ``reference.py`` says.

    Attributes:
        row_dtypes: of the rows that ``pack_rows`` and ``unpack_rows`` take.
    """

    @property
    def row_dtypes(self) -> tuple[torch.dtype, ...]: ...

    def pack_rows(
        self, bits: int, sqrt: bool, rows: Tensor, n_rows: int, row: int, codes: Tensor, parameters: Tensor
    ) -> None:
        """Packs the first ``n_rows`` rows of a storage, ``row`` elements each, companded where ``sqrt`` is set."""

    def unpack_rows(
        self, bits: int, sqrt: bool, codes: Tensor, parameters: Tensor, n_rows: int, row: int, rows: Tensor
    ) -> None:
        """Undoes :meth:`pack_rows`."""

    def pack_channels(
        self, widths: Tensor, starts: Tensor, x: Tensor, row: int, codes: Tensor, parameters: Tensor
    ) -> None:
        """Packs rows whose widths (int32) take turns; ``starts`` (int64) has where their codes begin, and the end."""

    def unpack_channels(
        self, widths: Tensor, starts: Tensor, codes: Tensor, parameters: Tensor, row: int, x: Tensor
    ) -> None:
        """Undoes :meth:`pack_channels`."""


def kernels_for(device: torch.device) -> Kernels | None:
    """Returns the compiled kernels for this device's memory; None where there are none, and plain ATen has to do."""
    if device.type == "cpu":
        return native_kernels()
    return _cuda_kernels() if device.type == "cuda" else None


@lru_cache(maxsize=1)
def _cuda_kernels() -> Kernels | None:
    """Returns Triton's kernels; None where it is not installed."""
    if find_spec("triton") is None:
        return None
    from fxhybrid.codecs.kernels.cuda import TritonKernels

    return TritonKernels()


def kernels_key() -> str:
    """Names the code at work on this machine: seconds measured with other code do not count."""
    on_cuda = torch.cuda.is_available() and find_spec("triton")
    return f"{native_key()}+triton{version('triton')}" if on_cuda else native_key()
