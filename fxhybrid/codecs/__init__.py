"""Codecs: smaller forms of saved tensors, and the two graph operators that use them.

=====================  ========  =================================================
spec                   lossless  for
=====================  ========  =================================================
``bitpack``            yes       bool: 1 bit each
``pool:kh,...,H,W``    yes       indices of a 2-d max pool: 1 byte each
``rowwise8:R`` (4)     no        float32, bfloat16, float16: 8 (4) bits each
``sqrt8:R`` (4)        no        the same with square-root companding, for rows with few large elements, as of softmax
``channelwise:<d...>`` no        float32 [N, C, ...]: 8, 4 or 2 bits, a digit per channel or group of them
=====================  ========  =================================================

Importing this package defines ``torch.ops.fxhybrid.compress`` and ``.decompress``.
"""

from fxhybrid.codecs import channelwise, lossless, ops, pool, rowwise  # noqa: F401  they register themselves
from fxhybrid.codecs.candidate_codecs import candidate_codecs, coarsest_lossy
from fxhybrid.codecs.codec import NOISE_AT_4_BITS, Codec, codec_kind, get_codec, register, registered_names
from fxhybrid.codecs.kernels.storage import TensorMeta
from fxhybrid.codecs.widths import bisect_multiplier, channels_per_row, widths_at

__all__ = [
    "NOISE_AT_4_BITS",
    "Codec",
    "TensorMeta",
    "bisect_multiplier",
    "candidate_codecs",
    "channels_per_row",
    "coarsest_lossy",
    "codec_kind",
    "get_codec",
    "register",
    "registered_names",
    "widths_at",
]
