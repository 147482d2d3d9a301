"""What is installed is what was tried: ``constraints.txt`` names one version of everything, direct or not."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!]*)")


def pins() -> dict[str, str]:
    """Versions by name. Every line is a plain pin: no range, address, option or file."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert None not in found, [line for line, pin in zip(lines, found, strict=True) if pin is None]
    by_name: dict[str, str] = {canonicalize_name(pin[1]): pin[2] for pin in found if pin}
    assert len(by_name) == len(lines), "a name stands there twice"
    return by_name


def ours() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [each for texts in lists for each in map(Requirement, texts) if each.name != "scala-serve"]


def test_every_requirement_has_one_version_that_satisfies_it() -> None:
    locked = pins()
    assert len(ours()) > 30
    for requirement in ours():
        assert requirement.url is None, requirement
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not pinned"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is pinned to {version}"


def test_what_requirements_require_is_pinned_too() -> None:
    """Of what is installed here, in as far as it is for this platform."""
    locked, seen, todo = (
        pins(),
        set[tuple[str, str]](),
        [(each.name, extra) for each in ours() for extra in ("", *each.extras)],
    )
    while todo:
        name, extra = todo.pop()
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        try:
            needed = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        for each in needed:
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                assert each.url is None, f"{name} needs {each}"
                assert canonicalize_name(each.name) in locked, f"{name} needs {each}, which is not pinned"
                todo += [(each.name, more) for more in ("", *each.extras)]
    assert len(seen) > 60
