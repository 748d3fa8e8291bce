"""How much memory this process could hold right now, in bytes.

On Linux: the kernel's MemAvailable, or what the tightest control group around this process still allows if that is
less; plus what this process holds itself, because a training step may use that too. Only its anonymous and shared pages
are added back: MemAvailable already counts file pages as available. Where there is no /proc, psutil says both. On CUDA:
what the driver has free, plus what PyTorch's allocator holds here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fxhybrid.errors import FxHybridError, InvalidArgument

try:
    import resource
except ImportError:  # Windows: processes have no such limits
    resource = None  # type: ignore[assignment]

_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


@dataclass(frozen=True)
class MemoryReading:
    """Holds one reading.

    Attributes:
        available_bytes: what this process could hold in all.
        own_bytes: how much of it this process holds already.
        total_bytes: physical memory, or the tightest limit.
    """

    available_bytes: int
    own_bytes: int
    total_bytes: int


def read_memory(device: str = "cpu", *, root: Path = Path("/")) -> MemoryReading:
    """Reads the memory of the machine (``"cpu"``) or of a GPU (``"cuda"``, ``"cuda:1"``).

    Args:
        device: whose memory.
        root: where ``proc`` and ``sys`` are found.

    Raises:
        InvalidArgument: there is no such device.
    """
    if device == "cpu":
        return _read_linux(root) if (root / "proc/meminfo").exists() else _read_psutil()
    if device.split(":")[0] == "cuda":
        return _read_cuda(device)
    raise InvalidArgument(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")


def _read_linux(root: Path) -> MemoryReading:
    machine, process = _fields(root / "proc/meminfo"), _fields(root / "proc/self/status")
    available, total = machine["MemAvailable"], machine["MemTotal"]
    # older kernels do not split the resident set; then file pages count twice, which is little for a trainer
    own = process["RssAnon"] + process["RssShmem"] if "RssAnon" in process else process["VmRSS"]
    for limit, left in _cgroup_limits(root):
        available, total = min(available, left), min(total, limit)
    return MemoryReading(min(available + own, total), own, total)


def _read_psutil() -> MemoryReading:
    import psutil  # where it is not needed, it is not loaded

    machine, own = psutil.virtual_memory(), int(psutil.Process().memory_info().rss)
    return MemoryReading(min(int(machine.available) + own, int(machine.total)), own, int(machine.total))


def _fields(path: Path) -> dict[str, int]:
    """Reads the lines ``Name:   123 kB`` of a /proc file, in bytes."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields, for every limited control group around this process, its limit and what it still allows."""
    for folder, limit_name, usage_name in _cgroup_folders(root):
        try:
            limit = int((folder / limit_name).read_text())  # "max" is no limit: not an integer
            usage = int((folder / usage_name).read_text())
        except (OSError, ValueError):
            continue
        if limit < _UNLIMITED:
            yield limit, max(0, limit - max(0, usage - _reclaimable(folder)))


def _cgroup_folders(root: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = base / path.lstrip("/")
        yield own, *names
        # in a container the path may not exist below the mount: then the mount itself is the group
        for folder in own.parents:
            if folder == base or base in folder.parents:
                yield folder, *names


def _reclaimable(folder: Path) -> int:
    """Counts file pages and slabs, which the kernel drops before it kills."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _RECLAIMABLE)


def _read_cuda(device: str) -> MemoryReading:
    torch = importlib.import_module("torch")  # not at the top: a device reports its memory before it needs torch
    if not torch.cuda.is_available():
        raise InvalidArgument(f"no CUDA device here, asked for {device!r}")
    free, total = torch.cuda.mem_get_info(device)
    own = int(torch.cuda.memory_reserved(device))
    return MemoryReading(int(free) + own, own, int(total))


def available_bytes(*, root: Path = Path("/")) -> int:
    """Returns what this process can still take in addition: free memory, within its control groups and limits."""
    reading = read_memory(root=root)
    return max(0, min([reading.available_bytes - reading.own_bytes, *_left_of_limits()]))


def _left_of_limits() -> Iterator[int]:
    """Yields what each limit of this process (``ulimit -d``, ``ulimit -v``) still allows."""
    if resource is None:
        return
    for kind, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft - _process_bytes(field)


@contextmanager
def data_limit(extra_bytes: int) -> Iterator[None]:
    """Lets the process take ``extra_bytes`` of private memory beyond what it has now, within the block.

    An allocation above that raises MemoryError, or torch's RuntimeError. The limit is the whole process's: use it
    where the process serves one device.

    Raises:
        FxHybridError: this system cannot limit a process so.
    """
    if resource is None or not Path("/proc/self/status").exists():
        raise FxHybridError(
            f"cannot hold this process to {extra_bytes} more bytes: that needs Linux (RLIMIT_DATA and /proc); "
            "train without the guard here"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = data_bytes() + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_bytes(process: int | str = "self") -> int:
    """Returns the private writable memory of a process, which is what ``RLIMIT_DATA`` bounds; 0 where it is gone."""
    return _process_bytes("VmData", process)


def _process_bytes(field: str, process: int | str = "self") -> int:
    try:
        return _fields(Path(f"/proc/{process}/status")).get(field, 0)
    except OSError:
        return 0
