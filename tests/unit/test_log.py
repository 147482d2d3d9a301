"""Log lines: nothing that a client sent can end one, and JSON holds all that there is."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from server.log import TextFormatter, configure, json_formatter, log_access, printable

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


def test_uvicorns_lines_and_warnings_have_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    logging.getLogger("uvicorn.error").info("up on %s", "x", extra={"color_message": "\x1b[1mup on %s"})
    logging.getLogger("scala.serve").debug("not told")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    up, old = map(json.loads, capsys.readouterr().err.splitlines())
    assert (up["logger"], up["message"], "color_message" in up) == ("uvicorn.error", "up on x", False)
    assert (old["logger"], old["level"]) == ("py.warnings", "WARNING")


def test_the_format_is_that_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    configure("warning", "text")
    logging.getLogger("scala.serve").info("not told")
    logging.getLogger("scala.serve").warning("told")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" WARNING scala.serve: told")


def test_an_access_line_leaves_out_what_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    scope = {"client": None, "method": "GET", "path": "/\n", "state": {"width": "", "request_id": "7f"}}
    with caplog.at_level("INFO"):
        log_access(scope, 404, 0.00123456, "")
    (told,) = caplog.records
    line = TextFormatter().format(told)
    assert line.endswith(r' scala.access: answered method=GET path="/\n" status=404 duration_ms=1.235 request_id=7f')
