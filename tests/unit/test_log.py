"""Log lines: nothing that a client sent can end one, and JSON holds all that there is."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from server.log import MAX_PENDING_BYTES, LineWriter, TextFormatter, configure, json_formatter, log_access, printable

HOSTILE = "a\r\n2026-11-23 00:00:00,000 INFO scala.serve: forged\x1b[2J\u2028\u202eb"


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def record(text: str, *arguments: object, error: Exception | None = None, **fields: object) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("scala.test", logging.WARNING, "file.py", 1, text, arguments, info)
    vars(made).update(fields)
    return made


def raised(text: str) -> Exception:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_what_can_be_printed_stays_as_it_is() -> None:
    assert printable("Zürich 東京 'x'") == "Zürich 東京 'x'"
    assert printable("a\nb\x1b[0m\x7f\u202e\ud800") == r"a\nb\x1b[0m\x7f\u202e\ud800"


def test_a_line_for_people_ends_with_its_fields() -> None:
    line = TextFormatter().format(record("%d of %s", 3, "x", request_id="7f", width="0.5"))
    assert line.endswith(" WARNING scala.test: 3 of x request_id=7f width=0.5")


@pytest.mark.parametrize("make", [TextFormatter, json_formatter])
def test_nobody_can_make_up_a_line(make: type[logging.Formatter]) -> None:
    """In text, all lines of a traceback are indented, so that none of them can be taken for another record."""
    formatted = make().format(record("got %s", HOSTILE, error=raised(HOSTILE), request_id=HOSTILE))
    first, *rest = formatted.split("\n")
    assert "forged" in first
    assert first.isprintable()
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
    assert formatted.split("\n") == formatted.splitlines()


def test_nobody_can_make_up_a_field() -> None:
    line = TextFormatter().format(record("answered", request_id="x status=200", outcome='"'))
    assert line.endswith(r' answered request_id="x status=200" outcome="\""')


def test_json_has_everything() -> None:
    line = json_formatter().format(record("got %s", "é\n", error=raised("no"), request_id="7f", width=0.5))
    fields = json.loads(line)
    assert "\n" not in line
    assert fields.pop("timestamp").endswith("+00:00")
    assert fields.pop("exception").endswith("ValueError: no")
    assert fields == {
        "level": "WARNING",
        "logger": "scala.test",
        "message": "got é\n",
        "request_id": "7f",
        "width": 0.5,
    }


def written(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error once the thread that writes them has."""
    logging.getLogger().handlers[0].flush()
    return capfd.readouterr().err.splitlines()


def test_uvicorns_lines_and_warnings_have_the_same_form(capfd: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    logging.getLogger("uvicorn.error").info("up on %s", "x", extra={"color_message": "\x1b[1mup on %s"})
    logging.getLogger("scala.serve").debug("not told")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    up, old = map(json.loads, written(capfd))
    assert (up["logger"], up["message"], "color_message" in up) == ("uvicorn.error", "up on x", False)
    assert (old["logger"], old["level"]) == ("py.warnings", "WARNING")


def test_the_format_is_that_of_the_settings(capfd: pytest.CaptureFixture[str]) -> None:
    configure("warning", "text")
    logging.getLogger("scala.serve").info("not told")
    logging.getLogger("scala.serve").warning("told")
    (line,) = written(capfd)
    assert line.endswith(" WARNING scala.serve: told")


def test_an_access_line_leaves_out_what_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    scope = {"client": None, "method": "GET", "path": "/\n", "state": {"width": "", "request_id": "7f"}}
    with caplog.at_level("INFO"):
        log_access(scope, 404, 0.00123456, "")
    (told,) = caplog.records
    line = TextFormatter().format(told)
    assert line.endswith(r' scala.access: answered method=GET path="/\n" status=404 duration_ms=1.235 request_id=7f')


# -- standard error that takes nothing


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        with suppress(OSError):
            os.close(descriptor)


def writer_to(descriptor: int) -> LineWriter:
    handler = LineWriter(descriptor)
    handler.setFormatter(TextFormatter())
    return handler


def read_all(reader: int) -> bytes:
    os.set_blocking(reader, False)
    read = b""
    with suppress(BlockingIOError):
        while piece := os.read(reader, 2**16):
            read += piece
    return read


def test_nobody_waits_for_a_reader_who_does_not_read_and_he_hears_of_what_he_missed(pipe: tuple[int, int]) -> None:
    reader, descriptor = pipe
    handler, started = writer_to(descriptor), time.monotonic()
    for number in range(3000):
        handler.handle(record("%d %s", number, "x" * 1000))
    assert time.monotonic() - started < 2, "20 us a line; the reader would be waited for for ever"
    read, num_after = b"", 0
    while b"after\n" not in read:
        assert time.monotonic() - started < 30
        read += read_all(reader)
        handler.handle(record("after"))
        num_after += 1
        time.sleep(0.005)
    while handler._pending or handler._writing:
        assert time.monotonic() - started < 30
        read += read_all(reader)
    lines = (read + read_all(reader)).decode().splitlines()
    losses = [int(found[1]) for line in lines if (found := re.search(r": (\d+) lines before this one are lost", line))]
    kept = [line for line in lines if line.endswith("x" * 1000)]
    assert sum(losses) > 1000
    assert sum(losses) + handler._num_lost == 3000 - len(kept) + num_after - sum(
        line.endswith("after") for line in lines
    )
    assert MAX_PENDING_BYTES // 1100 < len(kept) < 3000


def test_what_a_full_disk_does_not_take_is_counted_and_the_line_that_it_cut_is_ended(tmp_path: Path) -> None:
    """A file that may not grow further, as far as writing goes: the first write is cut, the second refused."""
    path, limits = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("wb") as file:
        handler = writer_to(file.fileno())
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            for number in range(3):
                handler.handle(record("%d %s", number, "x" * 80))
                handler.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        handler.handle(record("room again"))
        handler.flush()
    cut, told, after = path.read_text().splitlines()
    assert "scala.test: 0 " in cut
    assert len(cut) == 100
    assert "3 lines before this one are lost" in told
    assert after.endswith("room again")


def test_a_descriptor_that_is_closed_is_no_reason_to_raise(pipe: tuple[int, int]) -> None:
    reader, descriptor = pipe
    os.close(reader)
    handler = writer_to(descriptor)
    handler.handle(record("nobody reads"))
    handler.flush()
    assert handler._num_lost == 1


def test_a_lack_of_memory_costs_lines_and_not_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("wb") as file:
        handler = writer_to(file.fileno())
        with monkeypatch.context() as scarce:
            scarce.setattr(handler, "_write", mock.Mock(side_effect=MemoryError))
            handler.handle(record("lost"))
            handler.flush()
        handler.handle(record("written"))
        handler.flush()
    told, after = (tmp_path / "log").read_text().splitlines()
    assert ": 1 lines before this one are lost" in told
    assert after.endswith("written")


def test_standard_files_that_are_missing_are_opened_before_a_connection_can_take_their_place() -> None:
    code = (
        "import os, socket; os.close(0); os.close(2); from server.log import open_standard_files as opens; opens();"
        "print(os.path.samefile('/proc/self/fd/2', '/dev/null'), socket.socket().fileno() > 2)"
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    assert told.stdout.split() == ["True", "True"]
