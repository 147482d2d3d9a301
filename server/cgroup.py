"""CPU and memory limits of the container that this process lives in, which psutil does not know: it reports the host.

Linux control groups, version 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``), or both where a host mixes them. A limit may
stand at the process's own group or at any group above it. What cannot be read or makes no sense is no limit.
Every function reads anew, for limits change under a running pod. ``root`` is the root of the file system.

Source: Linux kernel documentation, admin-guide/cgroup-v2 and admin-guide/cgroup-v1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def available_cpus(root: Path = _ROOT) -> float:
    """Cores that this process may use, above 0: its quota, or the cores it may be scheduled on if they are fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpu_quota(root) or math.inf, cores)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that the tightest limit grants, or None for no limit."""
    return min((cores for cores, _ in _cpu_quotas(root)), default=None)


def cpu_throttled(root: Path = _ROOT) -> tuple[int, int] | None:
    """Scheduler periods so far, and how many of them used up the tightest quota; None where there is none."""
    tightest = min(_cpu_quotas(root), key=lambda quota: quota[0], default=None)
    if tightest is None:
        return None
    try:
        stat = dict(line.split() for line in _read(tightest[1] / "cpu.stat").splitlines())
        return int(stat["nr_periods"]), int(stat["nr_throttled"])
    except (KeyError, ValueError):
        return None


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """The tightest limit of memory, above 0, or None for no limit. Version 1 writes no limit as one of exabytes."""
    return min(_memory_limits(root), default=None)


def _memory_limits(root: Path) -> Iterator[int]:
    """Of every group that has one, own group first."""
    for group in _groups(root, "memory"):
        try:
            limit = int(_read(group / "memory.max") or _read(group / "memory.limit_in_bytes"))
            if limit > 0:
                yield limit
        except ValueError:  # "max", nothing at all, or nonsense
            continue


def _cpu_quotas(root: Path) -> Iterator[tuple[float, Path]]:
    """The quota in cores of every group that has one, own group first."""
    for group in _groups(root, "cpu"):
        text = _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        try:
            quota_us, period_us = map(int, text.split())
            if quota_us > 0 and period_us > 0:
                yield quota_us / period_us, group
        except (ValueError, OverflowError):  # "max", nothing at all, or nonsense
            continue


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's own group and those above it, as far as they can be seen from here, in every hierarchy."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            names = ("unified", "")  # version 2, which stands aside where version 1 was there first
        elif controller in controllers.split(","):
            names = (controllers, controller)
        else:
            continue
        mount = next((mounts / name for name in names if os.path.isdir(mounts / name)), mounts)
        # The path may count from the host's root while the container sees its own group mounted as if it were the root:
        # then /kubepods/pod1/ctr/worker is here as worker, and /kubepods/pod1/ctr as the mount itself.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        while parts and not os.path.isdir(mount.joinpath(*parts)):
            del parts[0]
        yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")  # a group's name may be any bytes
    except (OSError, ValueError):
        return ""
