"""Updates in 8 bits: what a device changed, as one byte a number, with one scale for each row."""

from __future__ import annotations

import numpy as np

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.protocol.messages import Array, Arrays

BITS, FULL_BITS = 8, 32
_LARGEST = 127
_SCALE = "//scale"  # after an array's name: the scales of its rows


def pack_update(trained: Arrays, base: Arrays) -> dict[str, Array]:
    """Packs a trained model as its differences to the model it began with; what is no float travels as it is.

    A value that is not finite makes its row not finite, so that the server refuses it as it would refuse the model.
    """
    packed: dict[str, Array] = {}
    for name, array in trained.items():
        if array.dtype.kind != "f":
            packed[name] = array
            continue
        rows = _rows(array.astype(np.float64) - base[name])
        scale = np.abs(rows).max(axis=1, keepdims=True) / _LARGEST
        finite = np.where(np.isfinite(rows) & np.isfinite(scale), rows, 0.0)
        packed[name] = np.rint(finite / np.where(scale > 0, scale, 1.0)).astype(np.int8).reshape(array.shape)
        packed[name + _SCALE] = scale[:, 0].astype(np.float32)
    return packed


def unpack_update(packed: Arrays, base: Arrays) -> dict[str, Array]:
    """Restores the trained model, within half a scale of each number.

    Raises:
        InvalidArgument: it is no packed update of this model.
    """
    unpacked: dict[str, Array] = {}
    for name, origin in base.items():
        array, scale = packed.get(name), packed.get(name + _SCALE)
        if array is None or (scale is None and origin.dtype.kind == "f"):
            raise InvalidArgument(f"{name} is missing in a packed update")
        if scale is None:
            unpacked[name] = array
            continue
        if array.shape != origin.shape or scale.shape != (len(_rows(origin)),):
            raise InvalidArgument(f"{name} has shape {array.shape} and {scale.shape} scales in a packed update")
        with np.errstate(invalid="ignore"):  # 0 times a scale that is not finite
            change = _rows(array.astype(np.float64)) * scale[:, None]
        unpacked[name] = np.asarray(origin + change.reshape(origin.shape)).astype(origin.dtype)
    return unpacked


def _rows(array: Array) -> Array:
    return array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1)
