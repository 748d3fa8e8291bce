"""Channel choices: the channel-wise codecs that tensors are offered, from the error of each row of channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fxhybrid.codecs import TensorMeta, bisect_multiplier, coarsest_lossy, get_codec, widths_at
from fxhybrid.codecs.kernels.reference import PARAMETER_BYTES, code_bytes
from fxhybrid.pipeline import Prepared


def channelwise_choices(prepared: Prepared, groups: Iterable[Mapping[int, Tensor]]) -> dict[int, tuple[str, ...]]:
    """Chooses codecs for the tensors of all groups that together take no more bytes than these at 4 bits a row.

    Args:
        prepared: what says which 4-bit codec a tensor has.
        groups: squared gradient error of each tensor's rows of channels at 4 bits.
    """
    errors = {t: each for group in groups for t, each in group.items()}
    four = coarsest_lossy(prepared.choices, errors)
    specs = channelwise_specs({t: prepared.meta(t) for t in errors}, errors, four)
    # what is uniform is offered already
    return {t: (spec,) for t, spec in specs.items() if set(spec.partition(":")[2]) not in ({"4"}, {"8"})}


def channelwise_specs(
    metas: Mapping[int, TensorMeta], errors: Mapping[int, Tensor], four_bits: Mapping[int, str]
) -> dict[int, str]:
    """Chooses codecs of least error that together take no more bytes than ``four_bits``.

    Args:
        metas: of each tensor [N, C, ...].
        errors: squared gradient error of each tensor's rows of channels at 4 bits.
        four_bits: each tensor's codec at 4 bits a row.
    """
    total_bytes = sum(sum(get_codec(four_bits[t]).encoded_bytes(metas[t])) for t in errors)
    row_bytes = {t: _row_bytes(metas[t], len(errors[t])) for t in errors}
    n_rows = {t: metas[t].shape[0] for t in errors}  # of each width

    def widths(multiplier: float) -> dict[int, tuple[int, ...]]:
        return {t: widths_at(multiplier, errors[t] / n_rows[t], row_bytes[t]) for t in errors}

    def n_bytes(multiplier: float) -> int:
        return sum(n_rows[t] * sum(row_bytes[t][w] for w in found) for t, found in widths(multiplier).items())

    multiplier = bisect_multiplier(n_bytes, total_bytes)
    if multiplier is None:
        return {}
    specs = {t: f"channelwise:{''.join(map(str, found))}" for t, found in widths(multiplier).items()}
    return {t: spec for t, spec in specs.items() if get_codec(spec).supports(metas[t])}


def _row_bytes(meta: TensorMeta, n_digits: int) -> dict[int, int]:
    row = meta.numel // meta.shape[0] // n_digits
    return {width: code_bytes(row, width) + PARAMETER_BYTES for width in (2, 4, 8)}
