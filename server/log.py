"""How log lines look: text for people, one JSON object a line for machines. Both show a line's ``extra`` fields.

What a client sent may stand in a line, in an exception's text too: whatever could end a line, move a terminal's cursor
or turn the direction of writing is escaped in both formats, so that nobody can make up lines or fields.

Lines are written by a thread of their own: whoever reads them may stop doing so, and the disk may be full.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate
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
STDERR = 2
MAX_PENDING_BYTES = 2**20  # of lines not written yet; then they are dropped
GATHER_S = 0.01  # that the first line waits for others to be written with it
FLUSH_S = 1.0
_WORD = re.compile(r'[^\s"=]+')
access_log, http_log = logging.getLogger("scala.access"), logging.getLogger("scala.http")


def configure(level: str, form: Literal["text", "json"]) -> None:
    """All of the process's lines, uvicorn's and Python's warnings included, go to standard error in this form."""
    handler = LineWriter(STDERR)
    handler.setFormatter(json_formatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def open_standard_files() -> None:
    """A process that is started without one of them would take the next connection for it, and write its log there."""
    for descriptor in range(STDERR + 1):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class LineWriter(logging.Handler):
    """Writes lines to a file descriptor, behind the back of those who log: whatever becomes of it, nobody waits.

    A line that finds no room, or cannot be written, is lost; the next that is written says how many were.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._pending: list[bytes] = []
        self._pending_bytes = self._num_lost = 0
        self._changed = threading.Condition(self.lock)
        self._writing = False
        self._cut = False  # what was written last is a part of a line
        threading.Thread(target=self._write_for_ever, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the lock held."""
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        if self._pending_bytes + len(line) > MAX_PENDING_BYTES:
            self._num_lost += 1
            return
        self._pending.append(line)
        self._pending_bytes += len(line)
        if len(self._pending) == 1:
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, for a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._pending or self._writing), FLUSH_S)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _write_for_ever(self) -> None:
        while True:
            with suppress(MemoryError):  # of which there may be more again
                with self._changed:
                    self._changed.wait_for(lambda: self._pending)
                    self._writing = True
                time.sleep(GATHER_S)
                self._write_pending()

    def _write_pending(self) -> None:
        with self._changed:
            lines, self._pending, self._pending_bytes = self._pending, [], 0
            num_lost, self._num_lost = self._num_lost, 0
        try:
            told = [self._line(_loss(num_lost))] if num_lost else []
            unwritten = self._write(told + lines)
        except MemoryError:
            unwritten = len(lines) + 1
        with self._changed:
            self._num_lost += unwritten if unwritten <= len(lines) else num_lost + len(lines)
            self._writing = False
            self._changed.notify_all()

    def _write(self, lines: list[bytes]) -> int:
        """How many were not written as a whole."""
        end = b"\n" if self._cut else b""
        data, num_written = end + b"".join(lines), 0
        with suppress(OSError):
            while num_written < len(data):
                num_written += os.write(self._descriptor, data[num_written:])
        if num_written:
            self._cut = data[num_written - 1] != ord("\n")
        return len(lines) - bisect_right([*accumulate(map(len, lines), initial=len(end))][1:], num_written)


def _loss(num_lines: int) -> logging.LogRecord:
    text = "%d lines before this one are lost: nobody read them, or there was no room"
    return logging.LogRecord("scala.log", logging.WARNING, __file__, 0, text, (num_lines,), None)


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
