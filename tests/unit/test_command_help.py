"""Help that teaches: every command has examples that would run, tells its exit codes, and completes in a shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from server.cli import app

COMMANDS = {
    "serve",
    "classify",
    "profile",
    "bench",
    "simulate",
    "replay",
    "train",
    "evaluate",
    "import-weights",
}
TELL_JSON = ("classify", "profile", "bench", "simulate", "replay", "evaluate")
GROUP: Any = typer.main.get_command(app)


def examples(command: str) -> list[list[str]]:
    """The words of each example, as a shell would hand them over."""
    lines = re.findall(r"^ +scala-serve (.+)$", GROUP.commands[command].help, re.M)
    return [shlex.split(line.partition(" > ")[0]) for line in lines]


def test_all_commands_are_there() -> None:
    assert GROUP.commands.keys() >= COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_examples_of_a_command_would_run(command: str) -> None:
    found = examples(command)
    assert any(words[0] == command for words in found)
    for name, *arguments in found:
        one = GROUP.commands[name]
        context = one.make_context(name, list(arguments))
        assert not context.args
    with pytest.raises(Exception, match="No such option"):
        GROUP.commands[command].make_context(command, ["--no-such-option"])


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_exit_codes_are_told(command: str) -> None:
    (codes,) = re.findall(r"Exit codes: (.+?)\n\n|Exit codes: (.+)$", GROUP.commands[command].help + "\n\n", re.S)[:1]
    assert re.match(r"0 .*\b2 wrong", " ".join(codes).replace("\n", " "))


@pytest.mark.parametrize("command", TELL_JSON)
def test_json_can_be_asked_for_alone(command: str) -> None:
    (option,) = (one for one in GROUP.commands[command].params if "--json" in one.opts)
    assert option.is_flag


def test_help_shows_examples_line_by_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "classify", "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    shown = [line.strip() for line in done.stdout.splitlines()]
    assert "Usage: scala-serve classify [OPTIONS] {FILE}..." in shown
    assert "scala-serve classify photos --budget-ms 100 --top-k 3" in shown


@pytest.mark.parametrize(
    ("typed", "offered"), [("scala-serve cl", "classify"), ("scala-serve serve --acc", "--access-log")]
)
def test_a_shell_completes(typed: str, offered: str) -> None:
    environ = {
        **os.environ,
        "_SCALA_SERVE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "server"], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == [offered], done.stderr
