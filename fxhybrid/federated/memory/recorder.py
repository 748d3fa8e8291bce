"""Record this machine's available memory to a trace file: ``python -m fxhybrid.federated.memory.recorder FILE``.

Every reading is on disk when the next is taken, so that a kill loses none; an existing file is not overwritten.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.memory.traces import MemoryTrace
from fxhybrid.profiling.system_memory import MemoryReading, read_memory


def record_trace(
    path: Path,
    *,
    interval_s: float = 5.0,
    n_readings: int | None = None,
    device: str = "cpu",
    name: str | None = None,
    read: Callable[[str], MemoryReading] = read_memory,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Samples every ``interval_s`` until ``n_readings`` (None: until interrupted); returns the number of readings.

    Args:
        path: the file; must not exist.
        interval_s: seconds between readings; a late one does not move those after it.
        n_readings: how many.
        device: as for :func:`read_memory`.
        name: of the device in the file; default: the host's.
        read: gives a reading of a device.
        clock: seconds, never going back.
        sleep: waits.
    """
    if not interval_s > 0 or (n_readings is not None and n_readings < 1):
        raise InvalidArgument(f"needs a positive interval and count, got {interval_s!r} s and {n_readings!r}")
    if path.exists():
        raise InvalidArgument(f"{path} exists; a recording never overwrites one")
    reading = read(device)
    details = {"interval_s": interval_s, "memory": device, "system": platform.platform()}
    empty = np.empty(0), np.empty(0, dtype=np.int64)
    header = MemoryTrace(name or platform.node(), reading.total_bytes, *empty, "recorded", details).header()
    start_s, taken = clock(), 0
    with path.open("x", encoding="utf-8", buffering=1) as file:
        file.write(f"{json.dumps(header)}\n")
        try:
            while n_readings is None or taken < n_readings:
                if taken:
                    sleep(max(0.0, start_s + taken * interval_s - clock()))
                    reading = read(device)
                file.write(f"{json.dumps([round(clock() - start_s, 6), reading.available_bytes])}\n")
                taken += 1
        except KeyboardInterrupt:
            pass
    return taken


def main(argv: Sequence[str] | None = None) -> None:
    """Records until the given time is over or Ctrl-C."""
    parser = argparse.ArgumentParser("python -m fxhybrid.federated.memory.recorder", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="seconds between readings (5)")
    parser.add_argument("--duration", type=float, metavar="S", help="default: until Ctrl-C")
    parser.add_argument("--memory", default="cpu", metavar="DEVICE", help="cpu (default), cuda or cuda:N")
    arguments = parser.parse_args(argv)
    n_readings = None if arguments.duration is None else max(1, int(arguments.duration / arguments.interval) + 1)
    try:
        taken = record_trace(
            arguments.file, interval_s=arguments.interval, n_readings=n_readings, device=arguments.memory
        )
    except InvalidArgument as error:
        parser.error(str(error))
    print(f"{taken} readings in {arguments.file}")


if __name__ == "__main__":
    main()
