"""Compiled kernels of the CPU: built by the machine's C++ compiler at first use, kept on disk, None where that fails.

Inductor was tried first: its row kernels were slower and took 10 to 48 s each to compile (docs/adr/0009). The kernels
work on memory that the caller allocates, so torch's allocator sees every byte. Calls go through ``ctypes``, which lets
other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fxhybrid.codecs.kernels.cache_folder import cache_folder
from fxhybrid.codecs.kernels.cpu_rows_source import ROWS
from fxhybrid.codecs.kernels.reference import PARAMETER_BYTES

_BUILD_LIMIT_S = 120  # a build takes one second
_DIGEST_BYTES = hashlib.sha256().digest_size
_FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS = (*_FLAGS, "-mprefer-vector-width=512")
_LINK = ("-fopenmp", "-shared", "-fPIC")
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "pack_rows": (_INT, _INT, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "unpack_rows": (_INT, _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT),
    "pack_channels": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "unpack_channels": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT),
}


class NativeKernels:
    """Calls the compiled kernels of the CPU: a ``protocol.Kernels``."""

    row_dtypes = (torch.float32,)

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def pack_rows(
        self, bits: int, sqrt: bool, rows: Tensor, n_rows: int, row: int, codes: Tensor, parameters: Tensor
    ) -> None:
        """Packs the first ``n_rows`` rows of a storage, ``row`` elements each."""
        places = (codes.data_ptr(), parameters.data_ptr(), torch.get_num_threads())
        self.library.pack_rows(bits, sqrt, rows.data_ptr(), n_rows, row, *places)

    def unpack_rows(
        self, bits: int, sqrt: bool, codes: Tensor, parameters: Tensor, n_rows: int, row: int, rows: Tensor
    ) -> None:
        """Undoes :meth:`pack_rows`."""
        places = (codes.data_ptr(), parameters.data_ptr())
        self.library.unpack_rows(bits, sqrt, *places, n_rows, row, rows.data_ptr(), torch.get_num_threads())

    def pack_channels(
        self, widths: Tensor, starts: Tensor, x: Tensor, row: int, codes: Tensor, parameters: Tensor
    ) -> None:
        """Packs rows whose widths take turns."""
        source = (widths.data_ptr(), starts.data_ptr(), x.data_ptr())
        geometry = (parameters.numel() // PARAMETER_BYTES, row, widths.numel())
        places = (codes.data_ptr(), parameters.data_ptr(), torch.get_num_threads())
        self.library.pack_channels(*source, *geometry, *places)

    def unpack_channels(
        self, widths: Tensor, starts: Tensor, codes: Tensor, parameters: Tensor, row: int, x: Tensor
    ) -> None:
        """Undoes :meth:`pack_channels`."""
        source = (widths.data_ptr(), starts.data_ptr(), codes.data_ptr(), parameters.data_ptr())
        geometry = (parameters.numel() // PARAMETER_BYTES, row, widths.numel())
        self.library.unpack_channels(*source, *geometry, x.data_ptr(), torch.get_num_threads())


@lru_cache(maxsize=1)
def native_kernels() -> NativeKernels | None:
    """Builds or finds the compiled kernels; None where there is no working compiler."""
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if found is None:
        return None
    try:
        compiler = tuple(shlex.split(found))  # CXX may hold more than a name
        library = ctypes.CDLL(str(_library(compiler)))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):  # no home, no room, no working compiler
        return None
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = None
    return NativeKernels(library)


def kernels_key() -> str:
    """Names what runs where there is a choice: the compiled kernels by their source and flags, or plain ATen."""
    kernels = native_kernels()
    # ctypes has no other name for the file
    return "aten" if kernels is None else Path(kernels.library._name).stem  # noqa: SLF001


def _library(compiler: tuple[str, ...]) -> Path:
    """Returns the library for this source, compiler, torch and processor; builds it unless a sound file is kept.

    Raises:
        OSError: no home, or no room.
        SubprocessError: the compiler does not work.
    """
    # what -march=native means here: a cache on a shared disk serves machines of different kinds
    command = [*compiler, *_FLAGS, "-E", "-dM", "-x", "c++", "-"]
    run = subprocess.run(command, input="", check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)
    key = "\n".join((ROWS, *compiler, *_FLAGS, *_LINK, run.stdout, torch.__version__))
    folder = cache_folder()
    if folder is None:
        raise OSError("there is no home to keep the library in")
    path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not _is_whole(path):
        _build(compiler, path)
    return path


def _is_whole(path: Path) -> bool:
    """Says whether a library is as it was built; loading one that is cut off ends the process."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _build(compiler: tuple[str, ...], path: Path) -> None:
    """Builds the library, and ends its file with a digest, which loaders do not read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        source.write_text(ROWS, encoding="utf-8")
        command = [*compiler, *_FLAGS, *_LINK, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_LIMIT_S)
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(path)  # at once: another process may build the same
