"""What the tests of several codecs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from torch import Tensor

from fxhybrid.codecs import Codec, TensorMeta

ROW = 64
BITS = pytest.mark.parametrize("bits", [8, 4, 2])
ROOT = pytest.mark.parametrize("root", [False, True], ids=["rows", "roots"])
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
