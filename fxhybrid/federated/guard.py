"""A hard limit on this process's memory, so that running out is an error here and not a kill from outside."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def data_limit(extra_bytes: int) -> Iterator[None]:
    """Within the block the process may take ``extra_bytes`` of private memory beyond what it has now.

    An allocation above that raises MemoryError, or torch's RuntimeError. The limit is the whole process's: use it
    where the process serves one device.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = data_bytes() + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_bytes() -> int:
    """Private writable memory of this process: what ``RLIMIT_DATA`` bounds."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0
