"""Settings: four sources, one order, and nothing wrong or unknown that passes in silence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from server.settings import Settings, SettingsError


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Writes a settings file and gives the environment that names it."""

    def write(text: str) -> dict[str, str]:
        (tmp_path / "scala.toml").write_text(text)
        return {"SCALA_CONFIG": str(tmp_path / "scala.toml")}

    return write


def problems(flags: dict[str, object] | None = None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as refusal:
        Settings.load(flags or {}, environ or {})
    return str(refusal.value).splitlines()


def problem(flags: dict[str, object] | None = None, environ: dict[str, str] | None = None) -> str:
    (line,) = problems(flags, environ)
    return line


# -- the sources


def test_the_defaults_are_those_of_the_design() -> None:
    assert Settings.load({}, {}).model_dump() == {
        "host": "127.0.0.1",
        "port": 8000,
        "admin_address": None,
        "workers": 1,
        "log_level": "info",
        "log_format": "text",
        "access_log": "off",
        "checkpoint": None,
        "model_name": None,
        "engine": "auto",
        "device": "auto",
        "num_threads": None,
        "policy": "adaptive",
        "default_budget_ms": 1000,
        "max_body_bytes": 20971520,
        "max_pixels": 50000000,
        "max_batch": None,
        "max_queue": 256,
        "max_connections": 1000,
        "client_timeout_s": 30,
        "profile_dir": None,
        "decision_log": None,
        "decision_log_bytes": 67108864,
        "api_keys_file": None,
        "rate_limit": None,
        "cors_origins": None,
        "tls_cert": None,
        "tls_key": None,
        "tls_key_password": None,
        "tls_client_ca": None,
        "drain_grace_s": 5,
        "drain_timeout_s": 30,
    }


def test_flag_over_environment_over_file_over_default(toml: Callable[[str], dict[str, str]]) -> None:
    environ = toml("port = 1\nmax_queue = 1\nmax_batch = 1") | {"SCALA_PORT": "2", "SCALA_MAX_QUEUE": "2"}
    settings = Settings.load({"port": 3}, environ)
    assert (settings.port, settings.max_queue, settings.max_batch, settings.max_pixels) == (3, 2, 1, 50_000_000)


def test_a_value_that_is_overruled_need_not_be_right(toml: Callable[[str], dict[str, str]]) -> None:
    assert Settings.load({"port": 3}, toml("port = 'x'") | {"SCALA_PORT": "y"}).port == 3


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALA_MAX_QUEUE", "77")
    assert Settings.load().max_queue == 77


def test_what_is_not_given_is_unset() -> None:
    assert Settings.load({"port": None}, {"SCALA_PORT": "", "SCALA_CONFIG": "", "SCALA_HOST": ""}) == Settings()


def test_every_setting_can_be_given_as_text() -> None:
    given = {
        "host": "::1",
        "port": "0",
        "admin_address": "[::1]:9000",
        "workers": "1",
        "log_level": "DEBUG",
        "log_format": "json",
        "access_log": "on",
        "checkpoint": "some/folder",
        "model_name": "pets.v2_0-b",
        "engine": "torch",
        "device": "cpu",
        "num_threads": "2",
        "policy": "fixed:0.5",
        "default_budget_ms": "2.5e2",
        "max_body_bytes": "1000",
        "max_pixels": "2000",
        "max_batch": "8",
        "max_queue": "16",
        "max_connections": "100",
        "client_timeout_s": "5",
        "profile_dir": "cache",
        "decision_log": "decisions",
        "decision_log_bytes": "2000000",
        "api_keys_file": "keys",
        "rate_limit": "100/second burst 200",
        "cors_origins": "https://a.example,http://localhost:3000",
        "tls_cert": "cert.pem",
        "tls_key": "key.pem",
        "tls_key_password": "secret",
        "tls_client_ca": "ca.pem",
        "drain_grace_s": "0",
        "drain_timeout_s": ".5",
    }
    settings = Settings.load({}, {f"SCALA_{name.upper()}": value for name, value in given.items()})
    assert given.keys() == Settings.model_fields.keys()
    typed = {
        "log_level": "debug",
        "checkpoint": Path("some/folder"),
        "profile_dir": Path("cache"),
        "decision_log": Path("decisions"),
        "api_keys_file": Path("keys"),
        "cors_origins": ("https://a.example", "http://localhost:3000"),
        "tls_cert": Path("cert.pem"),
        "tls_key": Path("key.pem"),
        "tls_key_password": SecretStr("secret"),
        "tls_client_ca": Path("ca.pem"),
        "default_budget_ms": 250.0,
        "drain_timeout_s": 0.5,
    }
    numbers = {name: int(value) for name, value in given.items() if value.isdecimal()}
    assert settings.model_dump() == given | numbers | typed


def test_settings_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


# -- wrong values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("port", value)
            for value in ("80a", " 8000 ", "8000\r", "1e3", "8_000", "80.0", "-1", "65536", "٣", "9" * 5000)
        ),
        *(("port", value) for value in (True, 80.0, -1, 65536, [8000])),
        *(("default_budget_ms", value) for value in ("nan", "inf", "1e999", "0", "600001", " 5", "1_0", "ms", "-5")),
        *(("default_budget_ms", value) for value in (math.nan, math.inf, -math.inf, True, 10**400)),
        *(("max_batch", value) for value in ("0", 0, 4097, "none")),
        *((name, 0) for name in ("max_body_bytes", "max_pixels", "max_queue", "num_threads")),
        *((name, value) for name in ("drain_grace_s", "drain_timeout_s") for value in (-0.1, math.nan, 3601)),
        *(("policy", value) for value in ("slack", "bands", "fixed", "fixed:", "Adaptive", "adaptive:0.5", 0.5)),
        *(
            ("policy", f"fixed:{width}")
            for width in ("0", "1.01", "-0.5", "nan", "1e-999999999", "1/2", " 0.5", "wide")
        ),
        *(("engine", value) for value in ("onnx", "cuda-graphs", "Torch", 1)),
        *(("device", value) for value in ("gpu", "cuda:0")),
        *(("host", value) for value in (" ", "a b", "http://x", "[::1]", 1)),
        *(
            ("admin_address", value)
            for value in ("9000", ":9000", "::1:9000", "a:0", "a:65536", "a:9/", "http://a:9", "a: 9", "a:٣", 9000)
        ),
        ("checkpoint", 1),
        *(("model_name", value) for value in (".", "..", "-a", "a/b", "Pets", "a b", "é", "a" * 64, 1, "stats")),
        ("profile_dir", 1),
        ("decision_log", 1),
        *(("decision_log_bytes", value) for value in (0, "1048575", "64M")),
        *((name, 1) for name in ("api_keys_file", "tls_cert", "tls_key", "tls_client_ca")),
        *(
            ("rate_limit", value)
            for value in ("100", "0/second", "100/day", "ten/second", " 1/second", "1/second,2/hour")
        ),
        *(("cors_origins", value) for value in ("app.example", "https://a/", "https://a, https://b", "https://*.a", 1)),
        ("log_level", "loud"),
        *(("workers", value) for value in (0, 2, "2", True, "x")),
    ],
)
def test_a_wrong_value_is_named_with_its_source_and_what_is_accepted(name: str, value: object) -> None:
    line = problem({name: value})
    assert line.startswith(f"flag --{name.replace('_', '-')} is {value!r:.200}; it must be ")
    if isinstance(value, str):
        assert problem({}, {f"SCALA_{name.upper()}": value}) == line.replace(
            f"flag --{name.replace('_', '-')}", f"environment SCALA_{name.upper()}"
        )


def test_refusals_say_what_there_is() -> None:
    assert problem({"engine": "onnx"}).endswith("must be 'auto', 'openvino', 'torch' or 'cuda_graphs'")
    assert "adaptive, slackfit, threshold, or fixed:<width>" in problem({"policy": "slack"})
    assert problem({"port": "80a"}).endswith("must be a whole number from 0 to 65535")
    assert "one process, one device, one engine thread; more GPUs or machines = more replicas" in problem(
        {"workers": 2}
    )


@pytest.mark.parametrize(
    "line", ["port = '80a'", "port = true", "port = 80.0", "port = [80]", "port = {a = 1}", "port = ''"]
)
def test_a_wrong_value_in_a_file_is_named_with_file_and_key(toml: Callable[[str], dict[str, str]], line: str) -> None:
    environ = toml(line)
    assert problem({}, environ).startswith(f"file {environ['SCALA_CONFIG']} key port is ")


def test_an_empty_host_in_a_file_would_listen_everywhere_and_is_refused(toml: Callable[[str], dict[str, str]]) -> None:
    assert "key host is ''" in problem({}, toml("host = ''"))
    assert "key checkpoint is ''" in problem({}, toml("checkpoint = ''"))


def test_a_secret_is_shown_nowhere(toml: Callable[[str], dict[str, str]]) -> None:
    settings = Settings.load({"tls_cert": "c", "tls_key": "k"}, {"SCALA_TLS_KEY_PASSWORD": "hunter2"})
    assert settings.tls_key_password is not None
    assert settings.tls_key_password.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    line = problem({}, toml("tls_key_password = 4711"))
    assert line.endswith("key tls_key_password is hidden; it must be text")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rate_limit": "1/second"}, "it needs api_keys_file"),
        ({"port": 9000, "admin_address": "127.0.0.1:9000"}, "a port of its own"),
        ({"tls_cert": "c"}, "set both or neither"),
        ({"tls_key": "k"}, "set both or neither"),
        ({"tls_client_ca": "a"}, "need tls_cert and tls_key"),
        ({"tls_key_password": "p"}, "need tls_cert and tls_key"),
    ],
)
def test_settings_that_need_each_other_are_refused_alone(flags: dict[str, object], words: str) -> None:
    assert words in problem(flags)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:9000", "127.0.0.1", 9000),
        ("[fe80::1%eth0]:9", "fe80::1%eth0", 9),
        ("localhost:65535", "localhost", 65535),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, host: str, port: int) -> None:
    assert Settings(admin_address=address).admin == (host, port)
    assert Settings().admin is None


def test_origins_may_be_a_list_in_a_file(toml: Callable[[str], dict[str, str]]) -> None:
    assert Settings.load({}, toml('cors_origins = ["https://a", "*"]')).cors_origins == ("https://a", "*")


# -- unknown names


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [("SCALA_PROT", "SCALA_PORT"), ("SCALA_Port", "SCALA_PORT"), ("SCALA_THREADS", "SCALA_NUM_THREADS")],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(variable: str, nearest: str) -> None:
    assert problem({}, {variable: "1"}) == f"environment {variable} is unknown; did you mean {nearest}?"


def test_an_unknown_name_like_no_other_is_refused_with_all_there_are() -> None:
    line = problem({}, {"SCALA_XYZZY": "1"})
    assert line.startswith("environment SCALA_XYZZY is unknown; there are SCALA_HOST, SCALA_PORT, ")


def test_an_unknown_flag_and_an_unknown_key_are_refused(toml: Callable[[str], dict[str, str]]) -> None:
    environ = toml("max_batches = 3\n[hosts]\na = 1")
    assert problems({"max_queues": 3}, environ) == [
        f"file {environ['SCALA_CONFIG']} key max_batches is unknown; did you mean max_batch?",
        f"file {environ['SCALA_CONFIG']} key hosts is unknown; did you mean host?",
        "flag --max-queues is unknown; did you mean --max-queue?",
    ]


@pytest.mark.parametrize(
    "variables",
    [
        {"SCALA_DATA_DIR": "/data", "SCALA_HOME": "/opt/scala", "PORT": "1", "scala_port": "1", "SCALA": "1"},
        # What Kubernetes sets for a Service called scala, and for one called scala-serve.
        {
            "SCALA_SERVICE_HOST": "10.0.0.1",
            "SCALA_SERVICE_PORT": "8000",
            "SCALA_SERVICE_PORT_HTTP": "8000",
            "SCALA_PORT": "tcp://10.0.0.1:8000",
            "SCALA_PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "SCALA_PORT_8000_TCP_ADDR": "10.0.0.1",
        },
        {
            "SCALA_SERVE_SERVICE_HOST": "10.0.0.1",
            "SCALA_SERVE_SERVICE_PORT_HTTP": "8000",
            "SCALA_SERVE_PORT": "tcp://10.0.0.1:8000",
            "SCALA_SERVE_PORT_8000_TCP_PROTO": "tcp",
        },
    ],
)
def test_variables_that_are_not_ours_are_left_alone(variables: dict[str, str]) -> None:
    assert Settings.load({}, variables) == Settings()


@pytest.mark.parametrize("variable", ["SCALA_SERVE_PORT", "SCALA_SERVICE"])
def test_what_only_resembles_a_kubernetes_variable_is_refused(variable: str) -> None:
    assert f"{variable} is unknown" in problem({}, {variable: "8000"})


# -- files and several problems


@pytest.mark.parametrize("content", [b"port = ", b"port = 1\nport = 2", b"\xff\xfe", b"\xef\xbb\xbfport = 1", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "scala.toml"
    if content is not None:
        path.write_bytes(content)
    line = problem({}, {"SCALA_CONFIG": str(path)})
    assert line.startswith(f"environment SCALA_CONFIG is '{path}'; it must be a readable TOML file (")


@pytest.mark.parametrize(
    "content",
    [
        b"hunter2",
        b"password: hunter2",
        b'tls_key_password = "hunter2',
        b'tls_key_pasword = "hunter2"',
        b'tls_key_password = { is = "hunter2" }',
        b'tls_key_password = "hunter2"',
        b"\xffhunter2",
    ],
    ids=["text", "yaml", "open quote", "wrong name", "wrong type", "without a certificate", "no utf-8"],
)
def test_what_stands_in_a_file_that_is_refused_is_not_repeated(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret.toml").write_bytes(content)
    assert "hunter2" not in "".join(problems(environ={"SCALA_CONFIG": str(tmp_path / "secret.toml")}))


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    assert "must be a readable TOML file" in problem({}, {"SCALA_CONFIG": str(tmp_path)})


def test_all_problems_are_named_at_once() -> None:
    lines = problems({"prot": 1, "policy": "x"}, {"SCALA_PORT": "80a", "SCALA_X": "1", "SCALA_CONFIG": "/nowhere.toml"})
    assert len(lines) == 5
    assert {line.split()[1] for line in lines} == {"--prot", "--policy", "SCALA_PORT", "SCALA_X", "SCALA_CONFIG"}
