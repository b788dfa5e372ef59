"""Probing a machine: memory, control groups of both versions, cores, GPUs. Trees of /proc and /sys are written out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid_k2.errors import HardwareError
from hybrid_k2.host.cgroup import cgroup_cpu_limit, cgroup_memory
from hybrid_k2.placement import Gpu, Machine
from tests.conftest import REPO
from tests.unit.placements import GIB

MIB = 1 << 20
MEMINFO = "MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\nHugePages_Total: 0\n"
V1_UNLIMITED = "9223372036854771712"


def write_tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def host(root: Path, total_gib: int = 64, available_gib: int = 48, **files: object) -> Path:
    meminfo = MEMINFO.format(total=total_gib * GIB // 1024, available=available_gib * GIB // 1024)
    return write_tree(root, {"proc/meminfo": meminfo, **files})


def test_without_control_groups_meminfo_decides(tmp_path: Path) -> None:
    machine = Machine.probe(host(tmp_path))
    assert (machine.host_memory_bytes, machine.host_available_bytes) == (64 * GIB, 48 * GIB)


@pytest.mark.parametrize(
    "content", [None, "", "MemTotal: 12 kB\n", "MemTotal: x kB\nMemAvailable: 1 kB\n", "MemTotal:\nMemAvailable:\n"]
)
def test_meminfo_that_cannot_be_read_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        write_tree(tmp_path, {"proc/meminfo": content})
    with pytest.raises(HardwareError, match=r"meminfo: expected MemTotal and MemAvailable"):
        Machine.probe(tmp_path)


def test_version_2_limits_of_the_group_and_its_ancestors_bind(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/job"
    root = host(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/user.slice/job",
            f"{group}/memory.max": "max",
            f"{group}/memory.current": 5 * GIB,
            "sys/fs/cgroup/user.slice/memory.max": 16 * GIB,
            "sys/fs/cgroup/user.slice/memory.current": 10 * GIB,
            "sys/fs/cgroup/user.slice/memory.stat": f"anon 1\ninactive_file {3 * GIB}\nactive_file {GIB}\nslab 7",
            f"{group}/cpu.max": "max 100000",
            "sys/fs/cgroup/user.slice/cpu.max": "350000 100000",
        },
    )
    assert list(cgroup_memory(root)) == [(16 * GIB, 10 * GIB)]  # 16 - (10 used - 4 of page cache)
    assert cgroup_cpu_limit(root) == 3.5
    machine = Machine.probe(root)
    assert (machine.host_memory_bytes, machine.host_available_bytes) == (16 * GIB, 10 * GIB)


def test_a_limit_above_the_free_memory_does_not_add_any(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 60 * GIB, "sys/fs/cgroup/memory.current": 0}
    machine = Machine.probe(host(tmp_path, available_gib=48, **files))
    assert (machine.host_memory_bytes, machine.host_available_bytes) == (60 * GIB, 48 * GIB)


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}
    assert Machine.probe(host(tmp_path, **files)).host_available_bytes == 0


def test_version_1_in_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """The path in /proc/self/cgroup is the host's; under the container's mount only the root is there."""
    root = host(
        tmp_path,
        **{
            "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/docker/0a1b\n3:cpu,cpuacct:/docker/0a1b\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 8 * GIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 6 * GIB,
            "sys/fs/cgroup/memory/memory.stat": (
                f"inactive_file {GIB // 4}\ntotal_inactive_file {GIB}\ntotal_active_file {GIB // 2}"
            ),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 150000,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
    )
    assert list(cgroup_memory(root)) == [(8 * GIB, 3 * GIB + GIB // 2)]
    assert cgroup_cpu_limit(root) == 1.5


def test_version_1_without_limits(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        **{
            "proc/self/cgroup": "4:memory:/job\n1:cpu:/",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert list(cgroup_memory(root)) == []
    assert cgroup_cpu_limit(root) is None


@pytest.mark.parametrize("content", ["", "max", "x y", "100000", "0 100000", "100000 0"])
def test_a_strange_cpu_quota_is_no_quota(tmp_path: Path, content: str) -> None:
    root = write_tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": content})
    assert cgroup_cpu_limit(root) is None


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    topology = "sys/devices/system/cpu/cpu{}/topology/{}"
    apart = {topology.format(cpu, "core_cpus_list"): cpu for cpu in allowed}
    paired = {topology.format(cpu, "thread_siblings_list"): f"{i // 2},{i // 2 + 99}" for i, cpu in enumerate(allowed)}
    assert Machine.probe(host(tmp_path / "apart", **apart)).cores == len(allowed)
    assert Machine.probe(host(tmp_path / "paired", **paired)).cores == (len(allowed) + 1) // 2
    assert Machine.probe(host(tmp_path / "unknown")).cores == len(allowed)


@pytest.mark.parametrize(("quota", "cores"), [(25_000, 1), (100_000, 1), (199_000, 1), (100_000_000, None)])
def test_a_cpu_quota_bounds_the_cores(tmp_path: Path, quota: int, cores: int | None) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"}
    assert Machine.probe(host(tmp_path, **files)).cores == (cores or len(os.sched_getaffinity(0)))


def test_affinity_bounds_the_cores(tmp_path: Path) -> None:
    host(tmp_path)
    code = (
        "import os; from pathlib import Path; from hybrid_k2.placement import Machine;"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        f"print(Machine.probe(Path({str(tmp_path)!r})).cores)"
    )
    assert run_python(code) == "1"


def test_this_machine_can_be_probed() -> None:
    machine = Machine.probe()
    assert 64 * MIB < machine.host_available_bytes <= machine.host_memory_bytes
    assert 1 <= machine.cores <= len(os.sched_getaffinity(0))
    assert bool(machine.gpus) != bool(machine.gpu_note)


def test_torch_is_imported_only_beside_a_driver(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import hybrid_k2.placement.machine as m; "
        "m._driver_library_loads = lambda: False;"
        f"gpus, note = m._probe_gpus(Path({str(tmp_path)!r})); print(gpus, note, 'torch' in sys.modules)"
    )
    assert run_python(code) == "() no NVIDIA driver False"


def test_a_driver_beside_this_torch(tmp_path: Path) -> None:
    """With a driver's file in the tree, the answer is torch's own, whatever this machine has."""
    import torch

    machine = Machine.probe(host(tmp_path, **{"proc/driver/nvidia/version": "NVRM"}))
    if torch.cuda.is_available():
        assert len(machine.gpus) == torch.cuda.device_count()
    elif torch.version.cuda is None:
        assert machine.gpus == ()
        assert machine.gpu_note == f"an NVIDIA driver is present, but torch {torch.__version__} is built without CUDA"
    else:
        assert machine.gpu_note.startswith(("an NVIDIA driver is present, but", "torch cannot use"))


def test_gpus_are_described_and_failures_become_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, **{"proc/driver/nvidia/version": "NVRM"})
    cuda = SimpleNamespace(
        device_count=lambda: 2,
        get_device_name=lambda index: f"Card {index}",
        get_device_capability=lambda index: (8, 6 + 3 * index),
        mem_get_info=lambda index: (20 * GIB + index, 24 * GIB),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    machine = Machine.probe(tmp_path)
    assert machine.gpus == (
        Gpu(0, "Card 0", 24 * GIB, 20 * GIB, (8, 6)), Gpu(1, "Card 1", 24 * GIB, 20 * GIB + 1, (8, 9)),
    )  # fmt: skip
    assert [gpu.device for gpu in machine.gpus] == ["cuda:0", "cuda:1"]
    assert machine.find_gpu("cuda:1") is machine.gpus[1]
    assert machine.find_gpu("cuda:2") is machine.find_gpu("host") is None

    def broken(index: int) -> tuple[int, int]:
        raise RuntimeError(f"CUDA error: device {index} is lost\nmore")

    cuda.mem_get_info = broken
    machine = Machine.probe(tmp_path)
    assert (machine.gpus, machine.gpu_note) == (
        (), "torch cannot use the NVIDIA driver: CUDA error: device 0 is lost",
    )  # fmt: skip


@pytest.mark.gpu
def test_a_gpu_is_found_with_its_free_memory() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gpu = Machine.probe().gpus[0]
    assert 0 < gpu.free_bytes <= gpu.memory_bytes
    assert gpu.memory_bytes == pytest.approx(torch.cuda.get_device_properties(0).total_memory, rel=0.05)


def test_a_described_machine_is_checked_and_shown() -> None:
    machine = Machine(64 * GIB, 60 * GIB, 8, (Gpu(0, "Card", 24 * GIB),))
    assert repr(machine) == "Machine(60.00 GiB of 64.00 GiB available, 8 cores, cuda:0 Card 24.00 GiB)"
    assert machine.gpus[0].free_bytes == 24 * GIB
    assert Gpu(0, "Card", 24 * GIB, 0).free_bytes == 0
    for memory, available, cores in ((GIB, 2 * GIB, 1), (GIB, -1, 1), (GIB, GIB, 0)):
        with pytest.raises(ValueError, match="Machine"):
            Machine(memory, available, cores)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    return result.stdout.strip()
