"""Everything that can go wrong with a request, as one tree.

A request meets the errors in this order: it comes in too slowly (``TooSlow``) or with too large a head
(``HeadTooLarge``); it has no API key where one is asked for (``NoApiKey``), one that is not known
(``UnknownApiKey``) or one that was used too often (``RateLimited``); it asks for a model that is not here
(``UnknownModel``); it is malformed (``BadRequest``), too big (``TooLarge``), not of a type that its route reads
(``UnsupportedBody``), not an image type we read (``UnsupportedImage``) or an image that fails to decode
(``BrokenImage``); no trained width could ever answer it (``Impossible``) or none can just now (``Shed``); the server is
starting or leaving (``Unavailable``); its deadline passed (``Expired``). The caller may also have gone away (``Gone``).
HTTP statuses are the edge's affair: see ``routes/problem.py``.
"""

from __future__ import annotations

from collections.abc import Mapping


class RequestError(Exception):
    """A request ended without an answer. ``detail`` is one sentence for the caller; ``extra`` names remedies."""

    def __init__(self, detail: str, *, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = dict(extra or {})


class UnknownModel(RequestError, LookupError):
    """Another model or version than the one that is served."""


class NoApiKey(RequestError):
    """The server asks for an API key, and there is none."""


class UnknownApiKey(RequestError):
    """The API key is none of this server's."""


class RateLimited(RequestError):
    """The API key was used more often than it may be. ``retry_after_s`` is when it may be again, in whole seconds."""

    def __init__(self, detail: str, *, retry_after_s: int) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class BadRequest(RequestError, ValueError):
    """Something in the request is not what it must be; the detail names the value and the remedy."""


class TooLarge(RequestError, ValueError):
    """More bytes or pixels than the configured limit."""


class TooSlow(RequestError):
    """The request did not come in within the time that a client has."""


class HeadTooLarge(RequestError, ValueError):
    """More headers, or more bytes of them, than any request needs."""


class UnsupportedBody(RequestError, ValueError):
    """The body's declared type or content coding is not one that its route reads."""


class UnsupportedImage(RequestError, ValueError):
    """The declared type is not an image type we read, or the bytes are nothing we recognise."""


class BrokenImage(RequestError, ValueError):
    """A recognised image that fails to decode."""


class Impossible(RequestError, ValueError):
    """No trained width can satisfy this on this machine, even when it is idle; ``extra`` lists what can."""


class Shed(RequestError):
    """Refused for load. ``retry_after_s`` is when trying again makes sense, in seconds."""

    def __init__(self, detail: str, *, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class Unavailable(RequestError):
    """The server is starting, draining or unhealthy, or has no memory for the request."""


def no_memory() -> Unavailable:
    """What a ``MemoryError`` means for the request that met it."""
    return Unavailable("The server has no memory for this request now; try again in a second.")


class Expired(RequestError):
    """Admitted, but the deadline came first."""


class EngineFailed(RequestError):
    """The engine raised on the batch that this request was in: a bug, whose details are in the log alone."""


class Gone(RequestError):
    """The client went away before its answer was ready."""
