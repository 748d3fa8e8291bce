"""Real data in the shape of the suite's cases: scikit-learn's digits, and the standard library's source."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fxhybrid import suite
from fxhybrid.extras import require

FIRST_ID = 10  # of the bytes; ids below are left to special tokens
WORD = torch.tensor(list(b"self"))
TEXT_BYTES = 4_000_000


def real_batch(case: suite.SuiteCase, size: suite.Size, number: int) -> suite.SuiteCase:
    """The case with another batch, the same at every call.

    Images are enlarged digits (U-Net: with four levels of brightness as regions), tokens are bytes of source (BERT:
    whether they hold a certain word; T5: what comes next). The other models get random data of another seed.
    """
    generator = Generator().manual_seed(number)
    x = case.inputs[0]
    if x.dim() == 4:
        images, digits = _digits()
        chosen = torch.randint(len(digits), (len(x),), generator=generator)
        large = F.interpolate(images[chosen], size=x.shape[2:], mode="bilinear").expand_as(x).contiguous()
        regions = (large[:, 0] * 2 + 2).floor().clamp(0, 3).long()
        is_unet = case.loss_args[0].dim() == 3
        return replace(case, inputs=(large,), loss_args=(regions if is_unet else digits[chosen],))
    if x.dtype == torch.int64:
        return _text_batch(case, generator)
    return replace(suite.load(case.name, size, seed=number), model=case.model)


def _text_batch(case: suite.SuiteCase, generator: Generator) -> suite.SuiteCase:
    ids, target = case.inputs[0], case.loss_args[0]
    length = ids.shape[1] + (target.shape[1] if case.kwargs else 0)
    text = _text()
    starts = torch.randint(len(text) - length, (len(ids), 1), generator=generator)
    windows = text[starts + torch.arange(length)].long()
    source, rest = windows[:, : ids.shape[1]] + FIRST_ID, windows[:, ids.shape[1] :] + FIRST_ID
    if case.kwargs:
        shifted = torch.cat([torch.zeros_like(rest[:, :1]), rest[:, :-1]], dim=1)
        return replace(case, inputs=(source,), loss_args=(rest,), kwargs={"decoder_input_ids": shifted})
    if target.dim() == 1:
        has_word = (windows.unfold(1, len(WORD), 1) == WORD).all(2).any(1)
        return replace(case, inputs=(source,), loss_args=(has_word.long(),))
    return replace(case, inputs=(source,), loss_args=(source.clone(),))


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    data = require("sklearn.datasets", "the benchmark").load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)


@lru_cache(maxsize=1)
def _text() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)[:TEXT_BYTES]), dtype=torch.uint8)
