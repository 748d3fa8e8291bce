"""Decides ADR 18: compares plain ATen and torch's kernels for embedding tables, to pack rows without a compiler.

Speeds of encode and decode in GB/s of float32 per CPU second of one thread, interleaved, medians. The library's
kernels are called bare: their format also needs a look at every tensor for non-finite and extreme values, which is not
counted here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.lib.common import wide_console
from benchmarks.lib.results import Record, append_record
from fxhybrid.codecs import TensorMeta, rowwise
from fxhybrid.codecs.kernels.protocol import kernels_for
from fxhybrid.codecs.rowwise import Rowwise

MINUTES = 1
NEEDS = ""

ROWS = (64, 196, 256, 784)
SIZE_BYTES = 25 << 20
LIBRARY = {8: "embedding_bag_byte", 4: "embedding_bag_4bit"}
Ways = tuple[Callable[[], object], Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints one row per row length, bits and format."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies.row_formats", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved runs per timing (default: 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append records to this JSON-lines file")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = Table(title=f"GB/s on {SIZE_BYTES >> 20} MiB, one thread")
    for column in ("row", "bits", "format", "encode", "decode"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for record in records(arguments.pairs):
        append_record(arguments.json, record)
        speeds = (f"{record[f'{way}_gbs']:.2f}" for way in ("encode", "decode"))
        table.add_row(str(record["row"]), str(record["bits"]), record["format"], *speeds)
    wide_console().print(table)


def records(pairs: int) -> Iterator[Record]:
    """Yields the speeds of each format for each row length and number of bits."""
    for row in ROWS:
        for bits in LIBRARY:
            x = torch.randn(SIZE_BYTES // (4 * row), row)
            for name, (encode_s, decode_s) in median_seconds(formats(x, bits), pairs).items():
                speeds = {"encode_gbs": x.nbytes / encode_s / 1e9, "decode_gbs": x.nbytes / decode_s / 1e9}
                yield {"row": row, "bits": bits, "format": name} | speeds


def formats(x: Tensor, bits: int) -> dict[str, Ways]:
    """Returns encode and decode of each format for the rows of ``x``, to be compared with relu's speed."""
    codec, meta = Rowwise(bits, x.shape[1]), TensorMeta.of(x)
    encoded = codec.encode(x)
    pack, unpack = (getattr(torch.ops.quantized, f"{LIBRARY[bits]}_{way}") for way in ("prepack", "unpack"))
    packed = pack(x)
    found: dict[str, Ways] = {}
    if kernels_for(x.device) is not None:
        found["compiled"] = (lambda: codec.encode(x), lambda: codec.decode(*encoded, meta))
    found["plain ATen"] = (
        without_kernels(lambda: codec.encode(x)),
        without_kernels(lambda: codec.decode(*encoded, meta)),
    )
    found["library, bare"] = (lambda: pack(x), lambda: unpack(packed))
    found["relu"] = (lambda: torch.relu(x), lambda: torch.relu(x))
    return found


def without_kernels(run: Callable[[], object]) -> Callable[[], object]:
    """Returns ``run`` as it is on a machine without a compiler."""

    def plain() -> None:
        with mock.patch.object(rowwise, "kernels_for", return_value=None):
            run()

    return plain


def median_seconds(ways: Mapping[str, Ways], pairs: int) -> dict[str, tuple[float, float]]:
    """Times all formats in turn, ``pairs`` times; the first round does not count."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for _ in range(pairs + 1):
        for name, both in ways.items():
            for own, run in zip(times[name], both, strict=True):
                start_s = time.thread_time()
                run()
                own.append(time.thread_time() - start_s)
    return {name: (statistics.median(e[1:]), statistics.median(d[1:])) for name, (e, d) in times.items()}


if __name__ == "__main__":
    main()
