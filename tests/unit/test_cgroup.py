"""Limits read from fake trees: what a container, a pod, an old host and a broken one have under /proc and /sys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.cgroup import available_cpus, cpu_quota, cpu_throttled, memory_limit_bytes

CGROUP = "proc/self/cgroup"
V1_UNLIMITED = "9223372036854771712\n"

Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes files, by their paths below /sys/fs/cgroup or in full for /proc, and gives the root."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            file = tmp_path / (name if name.startswith("proc/") else f"sys/fs/cgroup/{name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def stat(periods: int, throttled: int) -> str:
    return f"usage_usec 123\nnr_periods {periods}\nnr_throttled {throttled}\nthrottled_usec 5\n"


# -- version 2


def test_a_container_with_a_cgroup_namespace_is_its_own_root(tree: Tree) -> None:
    root = tree({CGROUP: "0::/\n", "cpu.max": "150000 100000\n", "cpu.stat": stat(40, 3)})
    assert cpu_quota(root) == 1.5
    assert cpu_throttled(root) == (40, 3)


def test_the_tightest_of_own_and_higher_groups_counts(tree: Tree) -> None:
    root = tree(
        {
            CGROUP: "0::/kubepods/pod1/ctr\n",
            "kubepods/cpu.max": "max 100000\n",
            "kubepods/pod1/cpu.max": "50000 100000\n",
            "kubepods/pod1/cpu.stat": stat(10, 9),
            "kubepods/pod1/ctr/cpu.max": "200000 100000\n",
            "kubepods/pod1/ctr/cpu.stat": stat(10, 0),
            "kubepods/pod2/cpu.max": "1000 100000\n",  # a neighbour
        }
    )
    assert cpu_quota(root) == 0.5
    assert cpu_throttled(root) == (10, 9)


def test_equal_limits_are_throttled_where_no_neighbour_is_counted(tree: Tree) -> None:
    limit = {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "100000 100000\n"}
    root = tree({CGROUP: "0::/a/b\n", "a/cpu.stat": stat(20, 7), "a/b/cpu.stat": stat(20, 1), **limit})
    assert cpu_throttled(root) == (20, 1)


@pytest.mark.parametrize(
    "path", ["/kubepods/pod1/ctr", "/../ctr", "/..", "/gone (deleted)", "/" + "x" * 5000, "no:where"]
)
def test_a_path_that_does_not_exist_here_is_the_mount_itself(tree: Tree, path: str) -> None:
    assert cpu_quota(tree({CGROUP: f"0::{path}\n", "cpu.max": "300000 100000\n"})) == 3


def test_a_group_inside_a_container_without_a_namespace_is_found(tree: Tree) -> None:
    inside = {"cpu.max": "200000 100000\n", "worker/cpu.max": "100000 100000\n"}
    assert cpu_quota(tree({CGROUP: "0::/kubepods/pod1/ctr/worker\n", **inside})) == 1


def test_max_is_no_limit(tree: Tree) -> None:
    root = tree({CGROUP: "0::/\n", "cpu.max": "max 100000\n", "cpu.stat": stat(0, 0), "memory.max": "max\n"})
    assert (cpu_quota(root), cpu_throttled(root)) == (None, None)


# -- version 1


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_version_1_has_a_mount_per_controller(tree: Tree, mount: str) -> None:
    root = tree(
        {
            CGROUP: "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n2:cpuset:/docker/abc\n1:name=systemd:/\n",
            f"{mount}/cpu.cfs_quota_us": "-1\n",
            f"{mount}/cpu.cfs_period_us": "100000\n",
            f"{mount}/docker/abc/cpu.cfs_quota_us": "25000\n",
            f"{mount}/docker/abc/cpu.cfs_period_us": "50000\n",
            f"{mount}/docker/abc/cpu.stat": "nr_periods 8\nnr_throttled 2\nthrottled_time 99\n",
        }
    )
    assert cpu_quota(root) == 0.5
    assert cpu_throttled(root) == (8, 2)


def test_version_1_in_a_container_shows_the_own_group_as_the_root(tree: Tree) -> None:
    quota = {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(tree({CGROUP: "3:cpuacct,cpu:/docker/abc\n", **quota})) == 2.5


def test_version_1_without_limits(tree: Tree) -> None:
    quota = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    root = tree({CGROUP: "3:cpu:/\n2:memory:/\n", "memory/memory.limit_in_bytes": V1_UNLIMITED, **quota})
    assert (cpu_quota(root), cpu_throttled(root)) == (None, None)


def test_a_hybrid_host_limits_cpu_in_version_1_beside_a_version_2_tree(tree: Tree) -> None:
    quota = {"cpu/app/cpu.cfs_quota_us": "100000\n", "cpu/app/cpu.cfs_period_us": "100000\n"}
    root = tree({CGROUP: "2:cpu:/app\n0::/app\n", "unified/app/cgroup.procs": "", **quota})
    assert cpu_quota(root) == 1


# -- nothing, or nonsense


def test_no_cgroups_is_no_limit(tmp_path: Path) -> None:
    assert (cpu_quota(tmp_path), cpu_throttled(tmp_path)) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "100000",
        "a b",
        "100000 0",
        "0 100000",
        "-1 -1",
        "1 2 3",
        "nan 1",
        "1" * 400 + " 1",
        "1" * 5000 + " 1",
        "\0",
    ],
)
def test_a_malformed_limit_is_no_limit(tree: Tree, text: str) -> None:
    root = tree({CGROUP: "0::/\n", "cpu.max": text, "cpu.stat": stat(1, 1), "memory.max": text.replace("100000", "x")})
    assert (cpu_quota(root), cpu_throttled(root)) == (None, None)


@pytest.mark.parametrize("text", ["", "nr_periods 1\n", "nr_periods 1\nnr_throttled x\n", "nr_periods\n", "a b c\n"])
def test_a_malformed_stat_is_nothing_known(tree: Tree, text: str) -> None:
    assert cpu_throttled(tree({CGROUP: "0::/\n", "cpu.max": "1 1\n", "cpu.stat": text})) is None


@pytest.mark.parametrize("text", ["", "\n\n", "0", "cpu", "1:cpu", ":::", "0::\0/x\n", "1:cpu:/a\n" * 3])
def test_a_malformed_list_of_groups_raises_nothing(tree: Tree, text: str) -> None:
    assert cpu_quota(tree({CGROUP: text, "other": ""})) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_bytes_that_are_not_utf_8_are_a_name_like_any_other(tree: Tree) -> None:
    root = tree({})
    group = os.fsencode(root) + b"/sys/fs/cgroup/\xff"
    os.makedirs(group)
    os.makedirs(root / "proc/self")
    (root / CGROUP).write_bytes(b"0::/\xff\n")
    Path(os.fsdecode(group), "cpu.max").write_text("70000 100000\n")
    assert cpu_quota(root) == 0.7


def test_a_directory_in_place_of_a_file_is_no_limit(tree: Tree) -> None:
    assert cpu_quota(tree({CGROUP: "0::/\n", "cpu.max/surprise": ""})) is None


# -- memory


def test_the_tightest_limit_of_memory_counts(tree: Tree) -> None:
    root = tree(
        {
            CGROUP: "0::/pod1/ctr\n",
            "memory.max": "max\n",
            "pod1/memory.max": "2000000000\n",
            "pod1/ctr/memory.max": "3000000000\n",
            "pod2/memory.max": "1000\n",  # a neighbour
        }
    )
    assert memory_limit_bytes(root) == 2_000_000_000


@pytest.mark.parametrize("text", ["max\n", "", "\n", "x", "0", "-1", "1e9", "1" * 5000, "\0"])
def test_no_limit_of_memory_or_a_malformed_one(tree: Tree, text: str) -> None:
    assert memory_limit_bytes(tree({CGROUP: "0::/\n", "memory.max": text})) is None


def test_version_1_limits_memory_in_a_hierarchy_of_its_own(tree: Tree) -> None:
    limits = {"memory/memory.limit_in_bytes": V1_UNLIMITED, "memory/app/memory.limit_in_bytes": "500\n"}
    assert memory_limit_bytes(tree({CGROUP: "3:cpu:/other\n2:memory:/app\n", **limits})) == 500


# -- what follows from them


def test_the_quota_or_the_schedulable_cores_whichever_is_less(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree({CGROUP: "0::/\n", "cpu.max": "250000 100000\n"})
    for cores, available in ((8, 2.5), (2, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert available_cpus(root) == available


@pytest.mark.parametrize(("count", "available"), [(4, 4), (None, 1)])
def test_a_platform_without_affinity_counts_its_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, available: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert available_cpus(tmp_path) == available


def test_this_machine_has_some_cpu() -> None:
    assert available_cpus() > 0
    assert (cpu_throttled() is None) or cpu_quota() is not None
