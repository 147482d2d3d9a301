"""Duties that may fail and end no server for it: a line in the log when that begins, and one when it is over."""

from __future__ import annotations

import logging
from types import TracebackType

log = logging.getLogger("scala.serve")


class Tolerated:
    """Around each try of a duty, any Exception of which it keeps to itself: "``what`` cannot be ``done``"."""

    def __init__(self, what: str, done: str) -> None:
        self._what, self._done, self._failing = what, done, False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        was_failing, self._failing = self._failing, isinstance(error, Exception)
        if self._failing and not was_failing:
            unexpected = None if isinstance(error, OSError) else error
            reason = str(error) or type(error).__name__
            log.warning("%s cannot be %s: %s", self._what, self._done, reason, exc_info=unexpected)
        elif error is None and was_failing:
            log.info("%s can be %s again", self._what, self._done)
        return self._failing
