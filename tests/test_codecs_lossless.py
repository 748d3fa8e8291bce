"""Lossless codecs give back every bit of random tensors: dtypes, layouts, odd and zero sizes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fxhybrid.codecs import TensorMeta, get_codec


def random_case(draw: random.Random) -> tuple[str, Tensor]:
    """A codec and a tensor for it, in a random layout, often a part of a larger storage."""
    if draw.random() < 0.5:
        return pool_case(draw)
    shape = [draw.choice([0, 1, 2, 3, 5, 8, 17, 31, 64]) for _ in range(draw.randint(0, 4))]
    return "bitpack", laid_out(torch.rand(shape) < draw.random(), draw)


def pool_case(draw: random.Random) -> tuple[str, Tensor]:
    kernel = [draw.randint(1, 5) for _ in range(2)]
    stride, dilation = ([draw.randint(1, 3) for _ in range(2)] for _ in range(2))
    padding = [draw.randint(0, size // 2) for size in kernel]
    plane = [draw.randint((k - 1) * d + 1, 24) for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randint(0, 4, (draw.choice([1, 2, 3]), draw.choice([1, 3, 8]), *plane)).float()  # many ties
    indices = max_pool2d(x, kernel, stride, padding, dilation, draw.random() < 0.5, return_indices=True)[1]
    numbers = (*kernel, *stride, *padding, *dilation, *plane)
    return f"pool:{','.join(map(str, numbers))}", laid_out(indices, draw)


def laid_out(x: Tensor, draw: random.Random) -> Tensor:
    """The same values with the dimensions in any order in storage, at any offset."""
    order = draw.sample(range(x.dim()), x.dim())
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])
    offset = draw.choice([0, 0, 1, 3])
    storage = torch.zeros(x.numel() + offset, dtype=x.dtype)
    return storage.as_strided(x.shape, x.stride(), offset).copy_(x)


def check(first: int, count: int) -> None:
    for seed in range(first, first + count):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        spec, x = random_case(draw)
        codec, meta = get_codec(spec), TensorMeta.of(x)
        qdata, header = codec.encode(x)
        decoded = codec.decode(qdata, header, meta)
        assert TensorMeta.of(decoded) == meta, (seed, spec)
        assert torch.equal(decoded, x), (seed, spec)
        assert (qdata.numel(), header.numel()) == codec.encoded_bytes(meta), (seed, spec)


def test_200_random_tensors_come_back() -> None:
    check(0, 200)


@pytest.mark.slow
def test_2000_random_tensors_come_back() -> None:
    check(0, 2000)
