"""What the tests of several codecs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fxhybrid.codecs import Codec, TensorMeta, rowwise
from fxhybrid.codecs.rowwise import Rowwise

ROW = 64
BITS = pytest.mark.parametrize("bits", [8, 4, 2])
SQRT = pytest.mark.parametrize("sqrt", [False, True], ids=["rows", "sqrt"])
CLOSE_TO_1 = torch.full((64,), 1 + 2.0**-12)
IS_FUSED = bool((torch.addcmul(-(CLOSE_TO_1 * CLOSE_TO_1), CLOSE_TO_1, CLOSE_TO_1) != 0).all())
SAME_BYTES = pytest.mark.skipif(not IS_FUSED, reason="ATen rounds twice in addcmul on this processor")
USUAL_ERROR = {8: 0.007, 4: 0.12, 2: 0.6}


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    qdata, header = codec.encode(x)
    return codec.decode(qdata, header, TensorMeta.of(x))


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@contextmanager
def plain_aten(module: ModuleType) -> Iterator[None]:
    """The codecs of a module without the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernels_for", lambda device: None)
        yield


class ReferenceRowwise(Rowwise):
    """Packs rows by plain ATen everywhere: the reference, with the same bytes."""

    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]:
        with plain_aten(rowwise):
            return super()._encode(x, meta)

    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        with plain_aten(rowwise):
            return super()._decode(qdata, header, meta)
