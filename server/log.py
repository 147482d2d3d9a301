"""How log lines look: text for people, one JSON object a line for machines. Both show a line's ``extra`` fields.

What a client sent may stand in a line, in an exception's text too: whatever could end a line, move a terminal's cursor
or turn the direction of writing is escaped in both formats, so that nobody can make up lines or fields.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from types import TracebackType
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from starlette.types import Scope

from server.errors import EngineFailed

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

# Asked every few seconds, by machines: they leave neither access lines nor traces.
PROBES = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
_NO_FIELDS = frozenset({*RESERVED_ATTRS, "asctime", "message", "color_message"})  # the last is uvicorn's, for terminals
_WORD = re.compile(r'[^\s"=]+')
access_log, http_log = logging.getLogger("scala.access"), logging.getLogger("scala.http")


def configure(level: str, form: Literal["text", "json"]) -> None:
    """All of the process's lines, uvicorn's and Python's warnings included, go to standard error in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_formatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def log_access(scope: Scope, status: int, seconds: float, trace_id: str) -> None:
    """One line for a request that was answered."""
    state = scope["state"]
    fields = {
        "client": scope["client"][0] if scope.get("client") else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(1000 * seconds, 3),
        "width": state["width"],
        "outcome": state.get("outcome"),
        "request_id": state["request_id"],
        "trace_id": trace_id,
    }
    access_log.info("answered", extra={name: value for name, value in fields.items() if value not in (None, "")})


def log_engine_failures(outcomes: Iterable[object], request_id: str) -> None:
    """One line for a request, if the engine failed on any of its images."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, EngineFailed)]
    if failures:
        http_log.error("%s", failures[0].detail, extra={"request_id": request_id, "images": len(failures)})


def printable(text: str) -> str:
    r"""The text on one line: what is no printable character is written as Python does, ``\n`` or ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class TextFormatter(logging.Formatter):
    """``2026-11-23 05:00:00,000 INFO scala.serve: ready name=value``; a traceback's lines follow, indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = (f" {name}={_word(value)}" for name, value in vars(record).items() if name not in _NO_FIELDS)
        return printable(super().formatMessage(record)) + "".join(fields)

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


def json_formatter() -> logging.Formatter:
    """``timestamp`` (UTC), ``level``, ``logger``, ``message``, then ``exception`` and other fields, if there are."""
    return JsonFormatter(
        ("timestamp", "levelname", "name", "message"),
        timestamp=True,
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        reserved_attrs=tuple(_NO_FIELDS),
        json_ensure_ascii=True,
    )


def _word(value: object) -> str:
    text = str(value)
    return text if _WORD.fullmatch(text) and text.isprintable() else json.dumps(text)
