"""What a benchmark tells of itself and of the machine, and how it shows a table: to people, and in a dated file."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from scala_model.config import ScalaConfig
from server.cgroup import available_cpus

Lines = Sequence[Sequence[str]]  # the cells of a table, the heading's first


@dataclass(frozen=True, slots=True)
class Setting:
    """What a dated file tells besides the numbers."""

    date: str
    command: str
    commit: str
    machine: str
    versions: Mapping[str, str]
    network: str


def setting_of(
    module: str, given: Sequence[str], packages: Sequence[str], config: ScalaConfig, checkpoint: Path | None
) -> Setting:
    """Of ``python -m module`` with these arguments, here and now. Without a checkpoint, weights are random."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    shape = f"{config.image_size} px, patch {config.patch_size}, {config.embed_dim} channels, depth {config.depth}"
    weights = "random weights" if checkpoint is None else checkpoint.name
    return Setting(
        date=datetime.date.today().isoformat(),
        command=shlex.join(["python", "-m", module, *given]),
        commit=commit.stdout.strip() or "unknown",
        machine=f"{available_cpus():g} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}",
        versions={"Python": platform.python_version(), **{name: version(name) for name in packages}},
        network=f"{shape}, {len(config.widths)} widths, {weights}",
    )


def dated_file(title: str, setting: Setting, facts: Sequence[str], lines: Lines, sentences: Sequence[str]) -> str:
    """``facts`` say how it was measured, and what was not; ``sentences`` what the table does not hold."""
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    made = [
        f"Command: `{setting.command}`.",
        f"Machine: {setting.machine}.",
        f"Software: commit {setting.commit}, {versions}.",
        f"Network: {setting.network}.",
    ]
    heading, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
    table = [heading, "|---" * len(lines[0]) + "|", *rows]
    parts = [[f"# {title}, {setting.date}"], _listed([*made, *facts]), table, _listed(sentences)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _listed(sentences: Sequence[str]) -> list[str]:
    return [f"* {sentence}" for sentence in sentences]


def show(title: str, lines: Lines, sentences: Sequence[str]) -> None:
    """To people: the same table and sentences."""
    heading, *rows = lines
    table = Table(*heading, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    print(*sentences, sep="\n")


def say(text: str) -> None:
    """How far it has come."""
    print(text, file=sys.stderr, flush=True)
