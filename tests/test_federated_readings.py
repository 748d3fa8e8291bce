"""Readings of a machine's memory: what the kernel, control groups and CUDA say, from files made up and real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fxhybrid.errors import InvalidArgument
from fxhybrid.profiling.system_memory import MemoryReading, available_bytes, data_limit, read_memory

MIB = 1 << 20
KIB = 1024


def machine(
    root: Path, *, cgroup: str = "0::/\n", status: str = "RssAnon: 300 kB\nRssShmem: 100 kB\nVmRSS: 900 kB\n"
) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    (root / "proc/self/status").write_text(f"Name:\tpython\n{status}")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, limit: str, usage: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def test_own_anonymous_pages_are_added_back(tmp_path: Path) -> None:
    # 5000 kB available + 300 anonymous + 100 shared of our own; the other 500 resident are file pages
    assert read_memory(root=machine(tmp_path)) == MemoryReading(5400 * KIB, 400 * KIB, 8000 * KIB)


def test_old_kernels_give_only_the_whole_resident_set(tmp_path: Path) -> None:
    assert read_memory(root=machine(tmp_path, status="VmRSS: 900 kB\n")).available_bytes == 5900 * KIB


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/pod/train\n")
    group(root / "sys/fs/cgroup/pod/train", "max", 900 * KIB)
    group(root / "sys/fs/cgroup/pod", str(2000 * KIB), 1500 * KIB, f"inactive_file {200 * KIB}\nanon 7\n")
    # 2000 - (1500 used - 200 reclaimable) = 700 left, + 400 of our own
    assert read_memory(root=root) == MemoryReading(1100 * KIB, 400 * KIB, 2000 * KIB)


def test_cgroup_version_1(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="7:cpu:/x\n5:memory:/docker/abc\n")
    folder = root / "sys/fs/cgroup/memory"  # inside a container the path does not exist, the mount is the group
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(3000 * KIB))
    (folder / "memory.usage_in_bytes").write_text(str(1000 * KIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {100 * KIB}\ninactive_file 0\n")
    assert read_memory(root=root).available_bytes == (3000 - 900 + 400) * KIB


def test_what_is_still_free_knows_nested_control_groups(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/pod/train\n")
    group(root / "sys/fs/cgroup/pod/train", "max", 900 * KIB)
    group(root / "sys/fs/cgroup/pod", str(2000 * KIB), 1500 * KIB, f"inactive_file {200 * KIB}\n")
    assert available_bytes(root=root) == 700 * KIB  # 2000 - (1500 used - 200 reclaimable); 5000 on the machine


def test_what_is_still_free_knows_the_limits_of_the_process() -> None:
    before = available_bytes()
    with data_limit(64 * MIB):
        assert available_bytes() <= 64 * MIB < before


def test_without_proc_psutil_is_asked(tmp_path: Path) -> None:
    reading = read_memory(root=tmp_path)
    assert 0 < reading.own_bytes < reading.available_bytes <= reading.total_bytes
    assert reading.total_bytes >= read_memory().total_bytes  # a control group may hold less than the machine


WITHOUT_RESOURCE = """
import sys
sys.modules["resource"] = None  # as on Windows
import fxhybrid
from fxhybrid.profiling.system_memory import available_bytes, data_limit
assert available_bytes() > 0
try:
    with data_limit(1):
        pass
except fxhybrid.FxHybridError as error:
    print(error)
"""


def test_systems_without_limits_import_and_say_so() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RESOURCE], capture_output=True, text=True, check=True)
    assert "cannot hold this process to 1 more bytes" in done.stdout


def test_this_machine_can_be_read() -> None:
    reading = read_memory()
    assert 0 < reading.own_bytes < reading.available_bytes <= reading.total_bytes


def test_own_memory_does_not_lower_the_reading(tmp_path: Path) -> None:
    lost_bytes = []
    for _ in range(5):  # other processes take memory meanwhile, but not each time
        before = read_memory()
        block = np.ones(256 * MIB, dtype=np.uint8)
        after = read_memory()
        assert after.own_bytes - before.own_bytes > 0.9 * block.nbytes
        lost_bytes.append(before.available_bytes - after.available_bytes)
        del block
    assert min(lost_bytes) < 0.5 * 256 * MIB


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_devices_that_are_not_there(device: str) -> None:
    torch = pytest.importorskip("torch")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidArgument, match=device):
        read_memory(device)


def test_cuda_adds_back_what_the_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(device: str) -> tuple[int, int]:
        assert device == "cuda:1"
        return 600, 1000

    cuda = SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=mem_get_info,
        memory_reserved=lambda device: 250 if device == "cuda:1" else 0,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert read_memory("cuda:1") == MemoryReading(850, 250, 1000)
