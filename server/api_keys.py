"""Who may ask for what: API keys, of which the server knows only hashes, and a rate for each of them.

A key is 32 random bytes. Salts and slow hashes protect passwords, which can be guessed; 256 random bits cannot, so a
plain SHA-256 gives nothing of them away, and takes a microsecond of every request.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Scope

from server.errors import NoApiKey, RateLimited, RequestError, UnknownApiKey
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from throttled import Throttled

PREFIX = "scala_"  # so that people and scanners for leaked secrets know one when they see it
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})[ \t]+(?P<hash>[0-9a-f]{64})")
# Probes carry no keys; and a page must be there before it can ask for one. Their calls carry it.
_OPEN = frozenset({"/", "/livez", "/readyz", "/docs", "/openapi.json"})
_OPEN_FOLDERS = ("/v2/health/", "/docs/", "/playground/")
_FOR_CALLERS = re.compile(  # whole paths, so that nothing is there for callers which is not named here
    r"/livez|/readyz|/v1/(classify|quote|model)|/v2/?|/v2/health/(live|ready)|/v2/repository/index"
    r"|/v2/repository/models/[^/\s]+/(load|unload)"  # which tell that there is no such thing
    r"|/v2/models/(?!stats$)[^/\s]+(/versions/[^/\s]+)?(/(ready|config|infer))?"
)


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def line_for(name: str, key: str) -> str:
    """What the server's file holds of a key. Raises ValueError for a name that the file could not hold."""
    line = f"{name} {_hash(key.encode()).hex()}"
    if not _LINE.fullmatch(line):
        raise ValueError(f"the name {name!r} must be 1 to 64 letters, digits or any of . _ @ -")
    return line


def read_keys(path: Path) -> dict[str, bytes]:
    """Hashes by name. Empty lines, and what follows a #, count for nothing. Raises SettingsError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the API keys in {path} cannot be read: {error}") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        found = _LINE.fullmatch(entry)
        if found is None:  # what stands there may be a key, and is not repeated
            raise SettingsError(
                f"{path}, line {number} is not a name and the SHA-256 of a key in 64 small hexadecimal digits: "
                "make one with scala-serve api-key NAME"
            )
        if found["name"] in keys:
            raise SettingsError(f"{path}, line {number} has the name {found['name']!r} again: give each key its own")
        keys[found["name"]] = bytes.fromhex(found["hash"])
    if not keys:
        raise SettingsError(f"{path} holds no API key, so that nobody could ask: add one with scala-serve api-key NAME")
    return keys


def is_open(path: str) -> bool:
    """Whether anybody may ask for it, with keys on."""
    return path in _OPEN or path.startswith(_OPEN_FOLDERS)


def is_for_callers(path: str) -> bool:
    """Whether it is there for whoever has images, rather than for the operator: see ``admin_address``."""
    return _FOR_CALLERS.fullmatch(path) is not None


class Gate:
    """Turns away whoever has no key of this server, or has used it too often."""

    def __init__(self, keys: Mapping[str, bytes], limiter: Throttled | None = None) -> None:
        self._keys, self._limiter = dict(keys), limiter

    @classmethod
    def of(cls, settings: Settings) -> Gate | None:
        """None when no keys are asked for. Raises SettingsError."""
        if settings.api_keys_file is None:
            return None
        keys = read_keys(settings.api_keys_file)
        return cls(keys, None if settings.rate_limit is None else _limiter(settings.rate_limit, len(keys)))

    def refusal(self, scope: Scope) -> RequestError | None:
        """Why this request may not come in; None if it may, with its key's name in ``scope["state"]``."""
        if is_open(scope["path"]):
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return NoApiKey("This server asks for an API key: send it as 'Authorization: Bearer KEY'.")
        name = self._name_of(key.strip())
        if name is None:
            return UnknownApiKey("The API key is not, or no longer, one of this server's: ask its operator for one.")
        scope["state"]["api_key"] = name
        return None if self._limiter is None else _exceeded(self._limiter, name)

    def _name_of(self, key: str) -> str | None:
        """In a time that tells nothing about the keys: all are compared, each in constant time."""
        digest, found = _hash(key.encode("latin-1")), None
        for name, known in self._keys.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _limiter(rate: str, num_keys: int) -> Throttled:
    if find_spec("throttled") is None:
        raise SettingsError("rate_limit needs throttled-py: pip install 'scala-serve[rate-limit]'")
    from throttled import MemoryStore, Throttled

    return Throttled(using="gcra", quota=rate, store=MemoryStore(options={"MAX_SIZE": num_keys}))


def _exceeded(limiter: Throttled, name: str) -> RateLimited | None:
    result = limiter.limit(name)
    if not result.limited:
        return None
    retry_after_s = max(1, math.ceil(result.state.retry_after))
    return RateLimited(
        f"The API key of {name} is used more often than it may be; try again in {retry_after_s} s.",
        retry_after_s=retry_after_s,
    )
