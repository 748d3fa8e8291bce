"""Measures speed, bytes and error of every codec, against ``torch.relu`` on the same bytes.

Every registered codec against ``torch.relu`` on the same bytes: speed of encode and decode (interleaved, medians of
ratios), bytes, and relative error on activations whose channels differ in scale. Judges the speed checks at the end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import max_pool2d

from benchmarks.lib.checks import Check, checks_table
from benchmarks.lib.common import seconds, wide_console
from benchmarks.lib.results import Record, append_record
from fxhybrid.accuracy.channel_widths import channelwise_specs
from fxhybrid.codecs import Codec, TensorMeta, channels_per_row, get_codec, registered_names
from fxhybrid.codecs.candidate_codecs import candidate_codecs, row_length

MINUTES = 20
NEEDS = ""

ROWS = (16, 48, 64, 196, 256, 784, 3136)
PLANES = (7, 14, 28, 56)
CHANNELS = 64
SIZES_MIB = (1, 4, 25)
LONG_ROW, LONG, SHORT = 256, 0.5, 0.25  # share of relu's speed, for rows of 256 and more, and for shorter ones
MIXED = 2.0  # encode time of channel-wise widths over that of uniform 4 bits


@dataclass(frozen=True)
class Case:
    """Holds a tensor, the codecs for it, and its row length or plane size."""

    layout: str
    natural_row: int
    x: Tensor
    codecs: tuple[Codec, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table per size and the checks."""
    parser = argparse.ArgumentParser("python -m benchmarks.codecs", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_MIB, metavar="MIB")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs per timing (default: 15)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="default: cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    arguments = parser.parse_args(argv)
    console = wide_console()
    name = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else "CPU"
    console.print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads", highlight=False)
    torch.manual_seed(0)
    records: list[Record] = []
    for size_mib in arguments.sizes:
        own = []
        for case in cases(size_mib << 20):
            case = replace(case, x=case.x.to(arguments.device))
            for codec in case.codecs:
                own.append(measure(case, codec, arguments.pairs) | {"size_mib": size_mib})
                append_record(arguments.json, own[-1])
        console.print(table(size_mib, own))
        records += own
    missing = set(registered_names()) - {r["codec"] for r in records}
    assert not missing, f"not measured: {missing}"
    console.print(checks_table(checks(records)))


def cases(n_bytes: int) -> Iterator[Case]:
    """Float rows, softmax's weights and planes of at least this many bytes, then bool and pool indices."""
    for row in ROWS:
        x = activations(-(-n_bytes // (4 * row)), row)
        yield Case(f"rows {row}", row, x, lossy_codecs(x))
        weights = x.softmax(1)
        yield Case(f"weights {row}", row, weights, sqrt_codecs(weights))
    for side in PLANES:
        n_samples = -(-n_bytes // (4 * CHANNELS * side * side))
        x = activations(n_samples * CHANNELS, side * side).view(n_samples, CHANNELS, side, side)
        yield Case(f"planes {side}x{side}", side * side, x, (*lossy_codecs(x), channelwise_codec(x)))
    yield Case("bool", 0, torch.rand(n_bytes) > 0.5, (get_codec("bitpack"),))
    pooled = activations(n_bytes // (8 * 784) + 1, 56 * 56).view(1, -1, 56, 56)
    indices = max_pool2d(pooled, 3, 2, 1, return_indices=True)[1]
    yield Case("pool indices", 0, indices, (get_codec("pool:3,3,2,2,1,1,1,1,56,56"),))


def activations(n_rows: int, row: int) -> Tensor:
    """Rows of normal numbers; the scales of 64 channels in turn are log-normal."""
    scale = torch.randn(CHANNELS).exp().repeat(n_rows // CHANNELS + 1)[:n_rows, None]
    return torch.randn(n_rows, row) * scale


def lossy_codecs(x: Tensor) -> tuple[Codec, ...]:
    """Returns the codecs that a plan is offered for a tensor of which nothing is known."""
    return tuple(codec for codec in candidate_codecs(TensorMeta.of(x)) if not codec.lossless)


def sqrt_codecs(weights: Tensor) -> tuple[Codec, ...]:
    """Returns the codecs with square-root companding, which only results of softmax are offered."""
    meta = TensorMeta.of(weights)
    return tuple(get_codec(f"sqrt{bits}:{row_length(meta, bits, planes=False)}") for bits in (8, 4))


def channelwise_codec(x: Tensor) -> Codec:
    """Returns the widths of least error in x itself at the bytes of 4 bits a row."""
    meta, per_row = TensorMeta.of(x), channels_per_row(x.shape[1], x[0, 0].numel())
    low, high = x.view(x.shape[0], x.shape[1] // per_row, -1).aminmax(dim=2)
    errors = {0: (high - low).double().square().sum(0)}
    return get_codec(channelwise_specs({0: meta}, errors, {0: f"rowwise4:{row_length(meta, 4)}"})[0])


def measure(case: Case, codec: Codec, pairs: int) -> Record:
    """Speed, bytes and error of one codec on one tensor; speed also against relu on float32 of the same bytes."""
    x, meta = case.x, TensorMeta.of(case.x)
    same = x if x.dtype == torch.float32 else torch.randn(meta.nbytes // 4, device=x.device)
    qdata, header = codec.encode(x)
    decoded = codec.decode(qdata, header, meta)
    relu = finished(lambda: torch.relu(same), x.device)
    encode_s, encode_ratio = against(finished(lambda: codec.encode(x), x.device), relu, pairs)
    decode_s, decode_ratio = against(finished(lambda: codec.decode(qdata, header, meta), x.device), relu, pairs)
    return {
        "codec": codec.spec.partition(":")[0],
        "lossless": codec.lossless,
        "layout": case.layout,
        "natural_row": case.natural_row,
        "row": getattr(codec, "row", None),
        "encode_gbs": meta.nbytes / encode_s / 1e9,
        "decode_gbs": meta.nbytes / decode_s / 1e9,
        "encode_ratio": encode_ratio,
        "decode_ratio": decode_ratio,
        "encode_s": encode_s,
        "share": (qdata.numel() + header.numel()) / meta.nbytes,
        "error": 0.0 if codec.lossless else float((decoded - x).norm() / x.norm()),
    }


def finished(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` to the end of what it starts on the device."""

    def to_the_end() -> None:
        run()
        torch.cuda.synchronize(device)

    return to_the_end if device.type == "cuda" else run


def against(run: Callable[[], object], relu: Callable[[], object], pairs: int) -> tuple[float, float]:
    """Median seconds of ``run``, and the median of relu's seconds over its own."""
    run()
    relu()
    both = [(seconds(run), seconds(relu)) for _ in range(pairs)]
    return statistics.median(own for own, _ in both), statistics.median(other / own for own, other in both)


def table(size_mib: int, records: Sequence[Record]) -> Table:
    """Builds a table of one row per layout and codec."""
    found = Table(title=f"{size_mib} MiB; x: speed over relu's")
    for name in ("layout", "codec", "row", "encode GB/s", "x", "decode GB/s", "x", "bytes", "error"):
        found.add_column(name, justify="left" if name in ("layout", "codec") else "right")
    for r in records:
        speeds = [f"{r[f'{way}_{what}']:.2f}" for way in ("encode", "decode") for what in ("gbs", "ratio")]
        row = "" if r["row"] is None else str(r["row"])
        found.add_row(r["layout"], r["codec"], row, *speeds, f"{r['share']:.3f}", f"{r['error']:.4f}")
    return found


def checks(records: Sequence[Record]) -> list[Check]:
    """Judges the speed: each lossy codec's slowest case."""
    found = []
    for codec in sorted({r["codec"] for r in records if not r["lossless"]}):
        for long, limit in ((True, LONG), (False, SHORT)):
            own = [r for r in records if r["codec"] == codec and (r["natural_row"] >= LONG_ROW) == long]
            for way in ("encode", "decode"):
                found.append(_speed_check(f"{codec} {way}, {'long' if long else 'short'} rows", own, way, limit))
    found.append(_mixed_check(records))
    return found


def _speed_check(name: str, records: Sequence[Record], way: str, limit: float) -> Check:
    slow = [r for r in records if r[f"{way}_ratio"] < limit]
    worst = min(records, key=lambda r: r[f"{way}_ratio"])
    text = f"{worst[f'{way}_ratio']:.2f} ({worst['size_mib']} MiB, {worst['layout']})"
    return Check(name, f">= {limit} x relu", f"slowest of {len(records)}: {text}; below: {len(slow)}", not slow)


def _mixed_check(records: Sequence[Record]) -> Check:
    uniform = {(r["size_mib"], r["layout"]): r["encode_s"] for r in records if r["codec"] == "rowwise4"}
    ratios = {
        (r["size_mib"], r["layout"]): r["encode_s"] / uniform[r["size_mib"], r["layout"]]
        for r in records
        if r["codec"] == "channelwise"
    }
    worst = max(ratios, key=lambda key: ratios[key])
    text = f"largest: {ratios[worst]:.2f} ({worst[0]} MiB, {worst[1]})"
    return Check("channelwise over uniform 4 bit", f"encode time <= {MIXED} x", text, ratios[worst] <= MIXED)


if __name__ == "__main__":
    main()
