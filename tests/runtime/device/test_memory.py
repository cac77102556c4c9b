"""Memory that is left: of the machine, or of the control group that this process is in, whichever is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.machines import plant
from pixtral_runtime.device.doctor import examine
from pixtral_runtime.device.memory import MemoryLimit, available_memory_bytes, memory_limits

GB = 1_000_000_000
MACHINE = {"proc/meminfo": "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB"}
UNLIMITED = 9223372036854771712  # as cgroup v1 writes it


def v2(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon {used - cached}\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}"
    return {f"{at}/memory.max": limit, f"{at}/memory.current": used, f"{at}/memory.stat": stat}


def v1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, object]:
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    stat = f"cache 0\ntotal_inactive_file {cached // 2}\ntotal_active_file {cached - cached // 2}"
    return {f"{at}/memory.limit_in_bytes": limit, f"{at}/memory.usage_in_bytes": used, f"{at}/memory.stat": stat}


V1_LINES = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/"


@pytest.mark.parametrize(
    ("files", "limit", "left"),
    [
        ({"proc/self/cgroup": "0::/"} | v2("", 2 * GB, GB), 2 * GB, GB),  # a container with a namespace of its own
        ({"proc/self/cgroup": "0::/job"} | v2("job", 2 * GB, GB, cached=GB // 4), 2 * GB, GB + GB // 4),
        ({"proc/self/cgroup": "0::/a/b"} | v2("a/b", "max", GB) | v2("a", 3 * GB, 2 * GB), 3 * GB, GB),
        ({"proc/self/cgroup": "0::/a/b"} | v2("a/b", 4 * GB, GB) | v2("a", 5 * GB, 4 * GB), 5 * GB, GB),
        ({"proc/self/cgroup": "0::/../other"} | v2("", 2 * GB, GB), 2 * GB, GB),
        ({"proc/self/cgroup": "0::/job"} | v2("job", GB, GB + 4096), GB, 0),
        ({"proc/self/cgroup": V1_LINES} | v1("docker/abc", 2 * GB, GB), 2 * GB, GB),
        ({"proc/self/cgroup": V1_LINES} | v1("", 2 * GB, GB, cached=GB // 2), 2 * GB, GB + GB // 2),  # the host's path
        ({"proc/self/cgroup": V1_LINES} | v1("docker/abc", UNLIMITED, GB) | v1("docker", 3 * GB, GB), 3 * GB, 2 * GB),
    ],
)  # fmt: skip
def test_the_tightest_control_group_bounds_memory(
    tmp_path: Path, files: dict[str, object], limit: int, left: int
) -> None:
    plant(tmp_path, MACHINE | files)
    assert memory_limits(tmp_path)[0] == MemoryLimit(limit, left)
    assert available_memory_bytes(tmp_path) == left
    (shown,) = [finding.value for finding in examine(tmp_path) if finding.name == "memory"]
    assert shown == (
        f"{left / 1e9:.1f} GB available of the {limit / 1e9:.1f} GB that this process's control group may have, "
        "on a machine with 16.4 GB"
    )


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/"},
        {"proc/self/cgroup": "0::/job"} | v2("job", "max", GB),
        {"proc/self/cgroup": V1_LINES} | v1("docker/abc", UNLIMITED, GB),
        {"proc/self/cgroup": "0::/job"} | v2("job", 12 * GB, GB),  # the machine has less left
        {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": "rubbish"},
    ],
)
def test_without_a_tighter_limit_the_machine_decides(tmp_path: Path, files: dict[str, object]) -> None:
    plant(tmp_path, MACHINE | files)
    assert available_memory_bytes(tmp_path) == 8_192_000_000


def test_a_group_bounds_memory_where_the_machine_does_not_say(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/self/cgroup": "0::/"} | v2("", 2 * GB, GB))
    assert available_memory_bytes(tmp_path) == GB
