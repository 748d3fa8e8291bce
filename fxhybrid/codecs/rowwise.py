"""What the row-wise codecs have in common: rows of floats as 8, 4 or 2 bits each, with a scale and offset per row.

Two formats carry the same specs; which one a process uses is settled once, by what it finds
(``rowwise_compiled.py``). Encoded tensors never leave the process.
"""

from __future__ import annotations

from fxhybrid.codecs.codec import Codec
from fxhybrid.codecs.kernels.reference import FLOATS
from fxhybrid.codecs.kernels.storage import TensorMeta
from fxhybrid.errors import CodecError

# Elements worked on at a time where a float32 copy is needed: little beside the tensor, at most 256 KiB.
_CHUNK_ELEMENTS = (1 << 12, 1 << 16)
_CHUNKS = 32


class Rowwise(Codec):
    """Rows of R elements, taken in storage order: specs ``rowwise8:R``, ``rowwise4:R``, ``rowwise2:R``.

    With ``root``, square roots of the elements are rounded instead: ``root8:R``, ``root4:R``.
    """

    lossless = False

    def __init__(self, bits: int, row: int, root: bool = False) -> None:
        self.spec = f"{'root' if root else 'rowwise'}{bits}:{row}"
        if row < 1 or row * bits % 8:
            raise CodecError(f"{self.spec} needs a positive row length divisible by {8 // bits}")
        self.bits = bits
        self.row = row
        self.root = root
        self.noise = 15 / ((1 << bits) - 1)

    def supports(self, meta: TensorMeta) -> bool:
        return meta.dtype in FLOATS and meta.is_dense


def chunk_elements(numel: int) -> int:
    """Elements of a tensor of ``numel`` that are worked on at a time."""
    smallest, largest = _CHUNK_ELEMENTS
    return min(max(numel // _CHUNKS, smallest), largest)
