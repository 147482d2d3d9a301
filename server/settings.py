"""What an operator can set, from four places: flag > environment > file > default.

A wrong value, an unknown name or an unreadable file is refused before anything starts, all of them at once, each in one
sentence that says where it stands. Numbers may be written as text everywhere, for the environment knows nothing else.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr, ValidationError, model_validator

# Stricter than int() and float(), which also take white space, "8_000", "nan" and the digits of other scripts.
_WHOLE = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HOST = re.compile(r"[\w.:%-]+")  # names, IPv4, IPv6 with a zone; never "", which would listen on every interface
_ADDRESS = re.compile(r"([\w.%-]+|\[[\w.:%-]+\]):([0-9]{1,5})")  # an IPv6 address stands in brackets
_RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour)( burst [1-9][0-9]{0,8})?")
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # one segment of a path: never "..", which clients would take away
_ORIGIN = re.compile(r"https?://[^/?#@,*\s]+")  # as browsers send it: no path, no slash at the end


SECRET = frozenset({"tls_key_password"})  # never shown, not even when wrong


class SettingsError(ValueError):
    """One line for every problem: the source, the value and what is accepted."""


def _whole(low: int, high: int) -> BeforeValidator:
    def check(value: object) -> int:
        number = int(value) if isinstance(value, str) and _WHOLE.fullmatch(value) else value
        if type(number) is not int or not low <= number <= high:  # a bool is no number here
            raise ValueError(f"must be a whole number from {low} to {high}")
        return number

    return BeforeValidator(check)


def _number(low: float, high: float) -> BeforeValidator:
    def check(value: object) -> float:
        number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
        if not isinstance(number, int | float) or isinstance(number, bool) or not low <= number <= high:  # nor is NaN
            raise ValueError(f"must be a number from {low} to {high}")
        return float(number)

    return BeforeValidator(check)


def _host(value: object) -> str:
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise ValueError("must be a host name or an address, such as 127.0.0.1, or 0.0.0.0 for every interface")
    return value


def _address(value: object) -> str:
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 0 < int(found[2]) <= 65_535:
        raise ValueError("must be an address and a port, such as 127.0.0.1:9000 or [::1]:9000")
    return found[0]


def _folder(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be the path of a folder")
    return Path(value)


def _file_path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be the path of a file")
    return Path(value)


def _rate(value: object) -> str:
    if not isinstance(value, str) or not _RATE.fullmatch(value):
        raise ValueError("must be requests per second, minute or hour, such as 100/second or 100/second burst 200")
    return value


def _model_name(value: object) -> str:
    if not isinstance(value, str) or not _MODEL.fullmatch(value):
        raise ValueError("must be 1 to 63 of a-z, 0-9, - . and _, with a letter or digit first, such as my-model")
    if value == "stats":
        raise ValueError("must be another name than stats: /v2/models/stats are the statistics of all models")
    return value


def _origins(value: object) -> tuple[str, ...]:
    """A list, or text with commas."""
    origins = value.split(",") if isinstance(value, str) else value
    if not isinstance(origins, list | tuple) or not all(
        isinstance(origin, str) and (origin == "*" or _ORIGIN.fullmatch(origin)) for origin in origins
    ):
        raise ValueError(
            "must be origins with commas between, such as https://app.example.com,http://localhost:3000, or *"
        )
    return tuple(origins)


def _secret(value: object) -> SecretStr:
    if not isinstance(value, str | SecretStr):
        raise ValueError("must be text")
    return value if isinstance(value, SecretStr) else SecretStr(value)


def _policy(value: object) -> str:
    """The form only: whether a width was trained is for the checkpoint to say."""
    kind, _, width = value.partition(":") if isinstance(value, str) else ("", "", "")
    fixed = kind == "fixed" and _NUMBER.fullmatch(width) and 0 < float(width) <= 1
    if value not in ("adaptive", "slackfit", "threshold") and not fixed:
        raise ValueError(
            "must be adaptive, slackfit, threshold, or fixed:<width> with a width in (0, 1], such as fixed:0.5"
        )
    return str(value)


def _one_worker(value: object) -> int:
    if value not in (1, "1") or isinstance(value, bool):
        raise ValueError("must be 1: one process, one device, one engine thread; more GPUs or machines = more replicas")
    return 1


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Settings(BaseModel):
    """The effective settings of one server. None means that the value follows from the machine or the package.

    Raises pydantic's ValidationError, a ValueError; ``load`` raises ``SettingsError``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    host: Annotated[str, BeforeValidator(_host)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, _whole(0, 65_535)] = 8000
    """TCP port to listen on; 0 takes any free one."""
    admin_address: Annotated[str, BeforeValidator(_address)] | None = None
    """Address and port where pages, metrics, statistics and settings are alone; by default they are beside the API."""
    workers: Annotated[int, BeforeValidator(_one_worker)] = 1
    """Processes that serve; always 1."""
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] = "info"
    """Least severity that is logged."""
    log_format: Literal["text", "json"] = "text"
    """How lines are logged: text for people, or one JSON object a line."""
    access_log: Literal["off", "on"] = "off"
    """Whether each request leaves a line; probes and scrapes never do."""

    checkpoint: Annotated[Path, BeforeValidator(_folder)] | None = None
    """Folder of the checkpoint; by default the one that comes with the package."""
    model_name: Annotated[str, BeforeValidator(_model_name)] | None = None
    """What clients call the model, in `/v2/models/<name>` and in answers; by default as its checkpoint's card does."""
    engine: Literal["auto", "openvino", "torch", "cuda_graphs"] = "auto"
    """What runs the network; auto takes the fastest that there is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto takes a GPU where there is one."""
    num_threads: Annotated[int, _whole(1, 1024)] | None = None
    """Threads of an engine on the CPU; by default they follow from the container's CPU limit."""
    policy: Annotated[str, BeforeValidator(_policy)] = "adaptive"
    """How widths are chosen: adaptive, or fixed:<width> for always the same."""
    default_budget_ms: Annotated[float, _number(1, 600_000)] = 1000.0
    """Milliseconds after its arrival by which a request that names no budget is due."""

    max_body_bytes: Annotated[int, _whole(1, 2**30)] = 20 * 2**20
    """Bytes that a request's body may have."""
    max_pixels: Annotated[int, _whole(1, 2**30)] = 50_000_000
    """Pixels that an image may have, width times height."""
    max_batch: Annotated[int, _whole(1, 4096)] | None = None
    """Images that a batch may have; by default 16 on a CPU and 256 on a GPU."""
    max_queue: Annotated[int, _whole(1, 65_536)] = 256
    """Images that may be inside at once: decoded, waiting or run."""
    max_connections: Annotated[int, _whole(1, 1_000_000)] = 1000
    """Connections that may be open at once; of more, those are closed on which the server has waited longest."""
    client_timeout_s: Annotated[float, _number(0.1, 3600)] = 30.0
    """Seconds that a client may take to send a request, and to take an answer."""
    profile_dir: Annotated[Path, BeforeValidator(_folder)] | None = None
    """Folder that keeps measured latencies for the next start; by default scala-serve in the user's cache."""
    decision_log: Annotated[Path, BeforeValidator(_folder)] | None = None
    """Folder that records every decision with its inputs, this server's alone; by default none is recorded."""
    decision_log_bytes: Annotated[int, _whole(2**20, 2**40)] = 64 * 2**20
    """Bytes that the decision log may have; the oldest decisions are deleted."""

    api_keys_file: Annotated[Path, BeforeValidator(_file_path)] | None = None
    """File with a name and a hash of each API key, as `scala-serve api-key` writes them; by default none is needed."""
    rate_limit: Annotated[str, BeforeValidator(_rate)] | None = None
    """Requests that each API key may send, such as 100/second; by default as many as it likes."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_origins)] | None = None
    """Origins whose pages may call this server, * for all; by default none but its own."""
    tls_cert: Annotated[Path, BeforeValidator(_file_path)] | None = None
    """PEM file of the server's certificate and its chain; with it, only HTTPS is served."""
    tls_key: Annotated[Path, BeforeValidator(_file_path)] | None = None
    """PEM file of the certificate's private key."""
    tls_key_password: Annotated[SecretStr, BeforeValidator(_secret)] | None = None
    """Password of an encrypted private key."""
    tls_client_ca: Annotated[Path, BeforeValidator(_file_path)] | None = None
    """PEM file of authorities that sign clients' certificates, which are then required; by default they are not."""

    drain_grace_s: Annotated[float, _number(0, 3600)] = 5.0
    """Seconds after SIGTERM for which new requests are still served."""
    drain_timeout_s: Annotated[float, _number(0, 3600)] = 30.0
    """Seconds after SIGTERM at which the server exits whatever is still in flight."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.admin is not None and self.admin[1] == self.port:
            raise ValueError(f"admin_address must have a port of its own: {self.port} is where the API is")
        if self.rate_limit is not None and self.api_keys_file is None:
            raise ValueError("rate_limit is for each API key: it needs api_keys_file")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or neither")
        if self.tls_cert is None and (self.tls_client_ca or self.tls_key_password):
            raise ValueError("tls_client_ca and tls_key_password need tls_cert and tls_key")
        return self

    @property
    def admin(self) -> tuple[str, int] | None:
        """Host and port of ``admin_address``."""
        if self.admin_address is None:
            return None
        host, _, port = self.admin_address.rpartition(":")
        return host.strip("[]"), int(port)

    @classmethod
    def load(cls, flags: Mapping[str, object] = {}, environ: Mapping[str, str] = os.environ) -> Self:
        """Flags by the settings' names (None: not given) over ``SCALA_*`` over the file ``SCALA_CONFIG`` over defaults.

        Raises SettingsError, one line a problem.
        """
        problems: list[str] = []
        given: dict[str, tuple[str, object]] = {}  # the source that wins, and its value
        for source in (_file(environ, problems), _environment(environ), _flags(flags)):
            for name, value in source.values.items():
                if name in cls.model_fields:
                    given[name] = (f"{source.kind} {source.spell(name)}", value)
                else:
                    problems.append(source.refusal(name, cls.model_fields))
        try:
            settings = cls.model_validate({name: value for name, (_, value) in given.items()})
        except ValidationError as refusal:
            for error in refusal.errors():
                accepted = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
                if not error["loc"]:
                    problems.append(accepted)
                    continue
                name = str(error["loc"][0])
                where, value = given[name]
                problems.append(f"{where} is {'hidden' if name in SECRET else f'{value!r:.200}'}; it {accepted}")
        if problems:
            raise SettingsError("\n".join(problems))
        return settings


class _Source(NamedTuple):
    """Where settings come from: their values by name, and how it spells a name."""

    kind: str
    spell: Callable[[str], str]
    values: Mapping[str, object]

    def refusal(self, unknown: str, known: Mapping[str, object]) -> str:
        nearest = difflib.get_close_matches(unknown.lower(), known, n=1)
        there_are = ", ".join(map(self.spell, known))
        remedy = f"did you mean {self.spell(nearest[0])}?" if nearest else f"there are {there_are}"
        return f"{self.kind} {self.spell(unknown)} is unknown; {remedy}"


def _flags(flags: Mapping[str, object]) -> _Source:
    values = {name: value for name, value in flags.items() if value is not None}
    return _Source("flag", lambda name: "--" + name.replace("_", "-"), values)


# Not ours to refuse: the variable that names the file, the key of `classify`, the tests' data, and where the Scala
# language is installed.
_NO_SETTING = ("SCALA_CONFIG", "SCALA_API_KEY", "SCALA_DATA_DIR", "SCALA_HOME")
# Kubernetes gives every pod such variables for every Service of its namespace that is called scala or scala-*. They may
# appear at a pod's first restart after the Service was made, and even SCALA_PORT=tcp://10.0.0.1:8000 is among them.
_SERVICE_LINK = re.compile(
    r"SCALA_(\w+_)?(SERVICE_(HOST|PORT)\w*=|PORT_[0-9]+_(TCP|UDP|SCTP)\w*=|PORT=(tcp|udp|sctp)://)"
)


def _environment(environ: Mapping[str, str]) -> _Source:
    """An empty variable counts as unset: that is how compose files and CI pass on what nobody set."""
    # Case is swapped, not lowered, so that SCALA_Port is as unknown as it looks and is named as it was written.
    values = {
        name.removeprefix("SCALA_").swapcase(): value
        for name, value in environ.items()
        if name.startswith("SCALA_")
        and name not in _NO_SETTING
        and not _SERVICE_LINK.match(f"{name}={value}")
        and value
    }
    return _Source("environment", lambda name: "SCALA_" + name.swapcase(), values)


def _file(environ: Mapping[str, str], problems: list[str]) -> _Source:
    path, values = environ.get("SCALA_CONFIG", ""), {}
    try:
        if path:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of which broken TOML and broken UTF-8 are kinds
        problems.append(f"environment SCALA_CONFIG is {path!r}; it must be a readable TOML file ({error})")
    return _Source(f"file {path} key", str, values)
