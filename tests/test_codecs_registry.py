"""Which codecs there are by name, which specs are refused, and which are offered for a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxhybrid.codecs import TensorMeta, candidate_codecs, get_codec, register, registered_names
from fxhybrid.codecs import codec as base
from fxhybrid.codecs.rowwise import Rowwise
from fxhybrid.errors import CodecError

BAD_SPECS = [
    "",
    "zip",
    "zip:3",
    "bitpack:1",
    "bf16",
    "fp8",
    "channelwise",
    "channelwise:483",
    "narrow:uint8",
    "rowwise4",
    "rowwise4:x",
    "rowwise4:0",
    "rowwise4:-64",
    "rowwise4:49",
    "rowwise2:64",
    "sqrt4:49",
    "sqrt2:64",
    "rowwise8: 64",
    "rowwise8:64,2",
    "pool:3,3",
    "pool:17,17,1,1,0,0,1,1,99,99",
    "pool:3,3,0,2,1,1,1,1,9,9",
    "pool:3,3,2,2,-1,1,1,1,9,9",
]


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_spec_is_an_error(spec: str) -> None:
    with pytest.raises(CodecError):
        get_codec(spec)


def test_unknown_name_lists_the_registered_ones() -> None:
    known = ", ".join(registered_names())
    with pytest.raises(CodecError, match=known):
        get_codec("zip")


def test_a_name_is_registered_once() -> None:
    for name in ("bitpack", "", "a:b"):
        with pytest.raises(CodecError):
            register(name, lambda parameters: get_codec("bitpack"))


class Silent(Rowwise):
    """Lossy, but says that it makes no error."""

    def __init__(self) -> None:
        super().__init__(4, 64)
        self.spec, self.noise = "silent", 0.0


def test_a_lossy_codec_must_claim_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._FACTORIES, "silent", lambda parameters: Silent())
    with pytest.raises(CodecError, match=r"noise 0\.0, which is 0 for lossless codecs and only for them"):
        get_codec("silent")


def candidates(x: Tensor) -> list[str]:
    return [codec.spec for codec in candidate_codecs(TensorMeta.of(x))]


def test_candidates() -> None:
    assert candidates(torch.zeros(9, dtype=torch.bool)) == ["bitpack"]
    assert candidates(torch.zeros(9, dtype=torch.int64)) == []
    assert candidates(torch.zeros(0)) == candidates(torch.zeros(63)) == []
    assert candidates(torch.zeros(9, 64, dtype=torch.float64)) == []
    assert candidates(torch.zeros(64, 9)[:, :8]) == []
    assert candidates(torch.zeros(0, dtype=torch.bool)) == []


@pytest.mark.parametrize(
    ("x", "rows"),
    [
        (torch.zeros(2, 8, 28, 28), (784, 784)),  # a row per sample and channel
        (torch.zeros(2, 8, 7, 7), (98, 98)),  # 49 is too short and not of whole bytes
        (torch.zeros(2, 4, 112, 112), (3136, 3136)),  # 12544 is halved twice
        (torch.zeros(4, 128, 1, 1), (128, 128)),
        (torch.zeros(3, 5, 768), (768, 768)),
        (torch.zeros(6, 768).t(), (768, 768)),
        (torch.zeros(2, 96, 8, 8).contiguous(memory_format=torch.channels_last), (384, 384)),  # 4 pixels
        (torch.zeros(2, 2048, 2, 2).contiguous(memory_format=torch.channels_last), (512, 512)),  # a quarter of a pixel
        (torch.zeros(100_003), (256, 256)),  # prime: the rest goes into the header
    ],
)
def test_row_length(x: Tensor, rows: tuple[int, int]) -> None:
    found = [spec for spec in candidates(x) if spec.startswith("rowwise")]
    assert found == [f"rowwise{bits}:{row}" for bits, row in zip((8, 4), rows, strict=True)]
