"""Real data in the shape of the suite's cases: scikit-learn's digits, and the standard library's source."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fxhybrid import suite
from fxhybrid.suite.sample_data import as_bytes, joined_source, library_modules, load_digits, random_windows

FIRST_ID = 10  # of the bytes; ids below are left to special tokens
WORD = torch.tensor(list(b"self"))
TEXT_BYTES = 4_000_000


def real_batch(case: suite.SuiteCase, number: int, *, held_out: bool = False) -> suite.SuiteCase:
    """Gives the case another batch, the same at every call; held-out ones are of data that no other batch is of.

    Images are enlarged digits (U-Net: with four levels of brightness as regions); the GRU reads one line of a digit
    at a step, the MLP all of its pixels. Tokens are bytes of source (BERT: whether they hold a certain word; T5: what
    comes next).
    """
    generator = Generator().manual_seed(number)
    make = _text_batch if case.inputs[0].dtype == torch.int64 else _digit_batch
    return make(case, generator, held_out)


def _part(data: Tensor, held_out: bool) -> Tensor:
    """Returns the last fifth, or the rest."""
    begin = len(data) * 4 // 5
    return data[begin:] if held_out else data[:begin]


def _digit_batch(case: suite.SuiteCase, generator: Generator, held_out: bool) -> suite.SuiteCase:
    x, target = case.inputs[0], case.loss_args[0]
    images, digits = (_part(data, held_out) for data in load_digits("the benchmark"))
    chosen = torch.randint(len(digits), (len(x),), generator=generator)
    height, width = x.shape[-2:] if x.dim() > 2 else (math.isqrt(x.shape[1]),) * 2
    large = F.interpolate(images[chosen], size=(height, width), mode="bilinear")
    channels = x.numel() // large.numel()
    inputs = large.expand(-1, channels, -1, -1).contiguous().view(x.shape)
    regions = (large[:, 0] * 2 + 2).floor().clamp(0, 3).long()
    return replace(case, inputs=(inputs,), loss_args=(regions if target.dim() == 3 else digits[chosen],))


def _text_batch(case: suite.SuiteCase, generator: Generator, held_out: bool) -> suite.SuiteCase:
    ids, target = case.inputs[0], case.loss_args[0]
    length = ids.shape[1] + (target.shape[1] if case.kwargs else 0)
    windows = random_windows(_part(_text(), held_out), len(ids), length, generator)
    source, rest = windows[:, : ids.shape[1]] + FIRST_ID, windows[:, ids.shape[1] :] + FIRST_ID
    if case.kwargs:
        shifted = torch.cat([torch.zeros_like(rest[:, :1]), rest[:, :-1]], dim=1)
        return replace(case, inputs=(source,), loss_args=(rest,), kwargs={"decoder_input_ids": shifted})
    if target.dim() == 1:
        has_word = (windows.unfold(1, len(WORD), 1) == WORD).all(2).any(1)
        return replace(case, inputs=(source,), loss_args=(has_word.long(),))
    return replace(case, inputs=(source,), loss_args=(source.clone(),))


@lru_cache(maxsize=1)
def _text() -> Tensor:
    return as_bytes(joined_source(library_modules())[:TEXT_BYTES])
