"""The container image, as far as it can be tried without a container engine: Dockerfile, locks, what is copied."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from server.settings import Settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = sorted((ROOT / "deploy/image").glob("*.txt"))
PIN = re.compile(
    r"^([A-Za-z0-9._-]+)==([^\s;]+)(?: ; (.+?))? *\\$((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?$)*)", re.M
)
OF_CUDA = re.compile(r"nvidia-|cuda-|triton$")  # what torch brings on Linux; development installs torch without


class Step(NamedTuple):
    """One instruction of the Dockerfile in the stage that it belongs to, without its comments and line ends."""

    stage: str
    name: str
    words: str


def read_steps() -> list[Step]:
    text = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    stage, steps = "", []
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        name, _, words = line.partition(" ")
        if name == "FROM":
            stage = words.split(" AS ")[1]
        if name:
            steps.append(Step(stage, name, words))
    return steps


STEPS = read_steps()


def words_of(name: str, stage: str = "runtime") -> list[str]:
    return [step.words for step in STEPS if (step.stage, step.name) == (stage, name)]


def copied_from_here() -> list[str]:
    copies = [step.words.split() for step in STEPS if step.name == "COPY" and not step.words.startswith("--from=")]
    return [source for *sources, _ in copies for source in sources]


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> dict[str, tuple[str, str, int]]:
    """Of each package its version, the marker of the systems it is for, and how many hashes it has."""
    found = PIN.findall(lock.read_text(encoding="utf-8"))
    return {normal(name): (version, marker, hashes.count("--hash=")) for name, version, marker, hashes in found}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def required(*extras: str) -> set[str]:
    """What the project itself asks for, by normal name."""
    lists = [PROJECT["project"]["dependencies"], *(PROJECT["project"]["optional-dependencies"][e] for e in extras)]
    return {normal(re.split(r"[\[<>=]", text)[0]) for texts in lists for text in texts}


def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: make install")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_what_is_locked_is_what_is_tested(lock: Path) -> None:
    tested, locked = constraints(), pins(lock)
    assert len(locked) == len(re.findall(r"^\S+==", lock.read_text(encoding="utf-8"), re.M)), (
        "a line was not understood"
    )
    for name, (version, marker, num_hashes) in locked.items():
        assert num_hashes >= 1, name
        if name in tested:
            assert version == tested[name], name
        else:  # installed where the tests do not run
            assert "win32" in marker or (lock.stem == "cuda" and OF_CUDA.match(name)), name


@pytest.mark.parametrize(("image", "engine"), [("cpu", "cpu"), ("cuda", "torch")])
def test_all_that_an_image_needs_is_locked(image: str, engine: str) -> None:
    """`make lock-image` was not forgotten when pyproject.toml changed."""
    assert required(engine, "rate-limit", "tracing") <= pins(ROOT / f"deploy/image/{image}.txt").keys()


def test_the_locks_are_for_the_python_of_the_image() -> None:
    (base,) = words_of("ARG", stage="")
    version = re.fullmatch(r"PYTHON_IMAGE=python:(3\.\d+)-slim-\w+", base)
    assert version is not None
    assert f"--python-version {version[1]} " in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_install_checks_hashes_or_takes_nothing_from_elsewhere() -> None:
    installs = re.findall(r"pip install ([^&]+)", " && ".join(step.words for step in STEPS if step.name == "RUN"))
    assert len(installs) == 4
    for install in installs:
        assert "--require-hashes" in install or ("--no-index" in install and "--no-deps" in install), install


def test_what_is_copied_is_there_and_let_through() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    for source in copied_from_here():
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), source
    for path in allowed:
        assert any(source == path or source.startswith(f"{path}/") for source in copied_from_here()), path


def test_all_of_the_wheel_is_copied() -> None:
    wheel, project = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"], PROJECT["project"]
    assert {*wheel["only-include"], *project["license-files"], project["readme"], "pyproject.toml"} <= set(
        copied_from_here()
    )


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_a_final_stage_takes_packages_and_builds_nothing(image: str) -> None:
    assert {step.name for step in STEPS if step.stage == image} <= {"FROM", "ENV", "COPY", "ARG", "LABEL"}
    assert words_of("FROM", image) == [f"runtime AS {image}"]
    assert words_of("COPY", image) == [f"--from={image}-packages /image /", "--from=package /image /"]


def test_the_default_image_is_for_the_cpu() -> None:
    assert STEPS[-1].stage == "cpu"


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for words in words_of("ENV") for pair in shlex.split(words))


def test_the_server_takes_the_image_s_settings() -> None:
    settings = Settings.load(environ=environment())
    assert settings.host == "0.0.0.0"
    assert words_of("EXPOSE") == [str(settings.port)]
    assert words_of("VOLUME") == [str(settings.profile_dir)]


def test_the_user_is_a_number_that_owns_the_volume() -> None:
    (user,) = words_of("USER")
    assert int(user) >= 10_000
    (run,) = words_of("RUN")
    name = re.search(r"useradd --uid (\d+) .*?(\w+) &&", run)
    assert name is not None
    assert name[1] == user
    assert f"install --directory --owner {name[2]} --group {name[2]} {words_of('VOLUME')[0]}" in run


def test_the_image_tells_what_it_is() -> None:
    labels = dict(pair.split("=", 1) for name in ("runtime", "cpu") for pair in shlex.split(words_of("LABEL", name)[0]))
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    project = PROJECT["project"]
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "licenses": project["license"],
        "version": "${VERSION}",
        "revision": "${REVISION}",
    }
    given = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(fnmatch(given, f"*--build-arg {name}=*") for name in ("VERSION", "REVISION"))


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A port on which every GET is answered with the status, if the path is that of liveness."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health(port: int) -> int:
    """The exit code of the image's own health check; a proxy of the environment is none of its business."""
    (words,) = words_of("HEALTHCHECK")
    python, *arguments = json.loads(words.partition("CMD ")[2])
    assert python == "python"
    variables = os.environ | {"SCALA_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, *arguments], env=variables, stderr=subprocess.DEVNULL, timeout=30, check=False
    ).returncode


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (404, False), (503, False)])
def test_the_health_check_asks_for_liveness(status: int, healthy: bool) -> None:
    with answering(status) as port:
        assert (health(port) == 0) is healthy


def test_nobody_there_is_not_healthy() -> None:
    with answering(200) as port:
        pass
    assert health(port) != 0
