"""The codec contract and the registry that turns a spec back into a codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fxhybrid.codecs.kernels.storage import TensorMeta
from fxhybrid.errors import CodecError

NOISE_AT_4_BITS = 1.0  # the unit of ``Codec.noise``


class Codec(ABC):
    """Turns a tensor into two smaller ones, and back.

    A codec is immutable and fully identified by its ``spec``. The sizes of what it makes follow from
    the tensor's meta alone, never from its values. A new codec sets ``spec`` and ``lossless``,
    fills in ``supports``, ``encoded_bytes``, ``_encode`` and ``_decode``, and is made known by
    :func:`register`; ``candidate_codecs.py`` then says which tensors are offered it.

    Attributes:
        spec: full static text, such as ``"rowwise4:196"``; ``get_codec(spec)`` is this codec again.
        lossless: whether decoding gives back every bit.
        noise: size of the error that a lossy codec makes on ordinary data, in units of that of 4 bits a row; 0 for
            lossless codecs and only for them. Three things depend on it: gradient errors are predicted in proportion
            to it; tensors whose error drifts in training are not offered codecs of ``NOISE_AT_4_BITS`` or more
            (``passes/codec_choices.py``); and of those that a tensor is offered, the one of most noise is calibrated
            first and the others are predicted from it (``coarsest_lossy``). A wrong value makes wrong predictions of
            other codecs.
        kernels_key: names the code at work on this machine, where there is a choice: times depend on it.
    """

    spec: str
    lossless: bool
    noise: float = 0.0
    kernels_key: str = ""

    @abstractmethod
    def supports(self, meta: TensorMeta) -> bool:
        """Tells whether tensors of this meta can be encoded; never raises."""

    @abstractmethod
    def encoded_bytes(self, meta: TensorMeta) -> tuple[int, int]:
        """Returns the exact bytes of qdata and header for a supported meta."""

    def example(self, meta: TensorMeta, device: torch.device) -> Tensor | None:
        """Makes data that may be encoded, for measuring times; None where random values will do.

        Override it where ``_encode`` relies on what the values are, as for the indices of a max pool.
        """
        return None

    def profiled_as(self) -> Codec:
        """Returns a codec that takes the same time on the same tensor: many specs may share one measurement.

        Override it where parameters follow from data, so that every re-plan would measure again.
        """
        return self

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a tensor.

        Args:
            x: tensor whose meta the codec supports.

        Returns:
            qdata and header: one-dimensional uint8 tensors, each alone in a fresh storage.

        Raises:
            CodecError: the codec does not support this tensor.
        """
        meta = _meta_of(x.shape, x.stride(), x.dtype)
        sizes_of(self, meta)
        return self._encode(x, meta)

    def decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor:
        """Decodes what :meth:`encode` made of a tensor with this meta.

        Returns:
            A tensor with exactly the meta's shape, strides and dtype, in a fresh storage.

        Raises:
            CodecError: the meta is not supported, or qdata and header are not of its size.
        """
        expected, found = sizes_of(self, meta), (qdata.numel(), header.numel())
        if found != expected:
            raise CodecError(
                f"{self.spec}: a tensor of shape {meta.shape} and {meta.dtype} is encoded in "
                f"{expected} bytes (qdata, header), not {found}"
            )
        return self._decode(qdata, header, meta)

    def check_supports(self, meta: TensorMeta) -> None:
        """Raises CodecError unless the meta is supported."""
        if not self.supports(meta):
            raise CodecError(
                f"{self.spec} cannot encode a tensor of shape {meta.shape}, strides {meta.stride} and {meta.dtype}"
            )

    @abstractmethod
    def _encode(self, x: Tensor, meta: TensorMeta) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _decode(self, qdata: Tensor, header: Tensor, meta: TensorMeta) -> Tensor: ...

    def __repr__(self) -> str:
        return f"<codec {self.spec}>"


@lru_cache(maxsize=4096)
def _meta_of(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> TensorMeta:
    """Returns the meta of a real tensor, kept: making one takes as long as packing 64 KiB."""
    return TensorMeta(tuple(shape), tuple(stride), dtype)


@lru_cache(maxsize=4096)
def sizes_of(codec: Codec, meta: TensorMeta) -> tuple[int, int]:
    """Returns ``encoded_bytes`` of a supported meta, kept: a step asks for the same ones again and again.

    Raises:
        CodecError: the meta is not supported.
    """
    codec.check_supports(meta)
    return codec.encoded_bytes(meta)


def empty_encoded(codec: Codec, meta: TensorMeta, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocates room for qdata and header of a supported meta, uint8 each, not filled in."""
    qdata_bytes, header_bytes = sizes_of(codec, meta)
    qdata = torch.empty(qdata_bytes, dtype=torch.uint8, device=device)
    return qdata, torch.empty(header_bytes, dtype=torch.uint8, device=device)


_FACTORIES: dict[str, Callable[[str], Codec]] = {}


def register(name: str, factory: Callable[[str], Codec]) -> None:
    """Makes a codec known under a name.

    Args:
        name: the spec's text before the colon.
        factory: makes the codec from the text after the colon (empty without a colon); raises
            ValueError or CodecError for bad parameters.

    Raises:
        CodecError: the name is taken or not usable in a spec.
    """
    if not name or ":" in name:
        raise CodecError(f"codec name {name!r} must be non-empty and without a colon")
    if name in _FACTORIES:
        raise CodecError(f"a codec named {name!r} is registered already")
    _FACTORIES[name] = factory


def registered_names() -> tuple[str, ...]:
    """Returns the names of all registered codecs, sorted."""
    return tuple(sorted(_FACTORIES))


@lru_cache(maxsize=4096)
def get_codec(spec: str) -> Codec:
    """Returns the codec that a spec such as ``"rowwise4:196"`` names.

    Raises:
        CodecError: unknown name or bad parameters.
    """
    name, _, parameters = spec.partition(":")
    factory = _FACTORIES.get(name)
    if factory is None:
        raise CodecError(f"unknown codec {spec!r}; registered are {', '.join(registered_names())}")
    try:
        codec = factory(parameters)
    except ValueError as error:
        raise CodecError(f"bad parameters in codec {spec!r}: {error}") from error
    if codec.spec != spec:
        raise CodecError(f"codec {spec!r} must be written {codec.spec!r}")
    if codec.lossless != (codec.noise == 0):  # a lossy plan would count as exact
        raise CodecError(f"codec {spec!r} has noise {codec.noise}, which is 0 for lossless codecs and only for them")
    return codec


def codec_kind(spec: str) -> str:
    """Returns the name in a spec: what it does, without the parameters that depend on a tensor's sizes."""
    return spec.partition(":")[0]


def parse_integers(parameters: str, names: str) -> tuple[int, ...]:
    """Reads comma-separated integers, one for each of the comma-separated names.

    Raises:
        ValueError: not as many integers as names.
    """
    fields = parameters.split(",")
    if len(fields) != len(names.split(",")):
        raise ValueError(f"expected {names}, found {parameters!r}")
    return tuple(int(field) for field in fields)


def empty_header(like: Tensor) -> Tensor:
    """Makes a header of no bytes."""
    return like.new_empty(0, dtype=torch.uint8)
