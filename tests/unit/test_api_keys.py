"""Keys: how they are made, what is kept of them, and which files are refused."""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.api_keys import Gate, is_open, line_for, new_key, read_keys
from server.cli import main
from server.settings import Settings, SettingsError

HASH = "ab" * 32


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    return path


def test_a_key_has_256_random_bits() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"scala_[\w-]{43}", key) for key in made)


def test_the_file_holds_its_sha_256() -> None:
    assert line_for("alice", "scala_x") == f"alice {hashlib.sha256(b'scala_x').hexdigest()}"
    for name in ("", "a b", "a#b", "x" * 65, "a\n"):
        with pytest.raises(ValueError, match="letters, digits"):
            line_for(name, "scala_x")


def test_the_command_shows_the_key_once_and_keeps_its_hash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["api-key", "alice@example.com"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    (key,) = re.findall(r"scala_[\w-]+", err)
    assert out == line_for("alice@example.com", key) + "\n"
    assert read_keys(written(tmp_path, out)) == {"alice@example.com": hashlib.sha256(key.encode()).digest()}


def test_a_name_that_cannot_be_kept_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["api-key", "a b"])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("scala-serve: the name 'a b' must be")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no API key"),
        ("# none yet\n", "holds no API key"),
        (f"a {HASH}\nb {HASH[:-1]}", "line 2"),
        (f"{HASH}", "line 1"),
        (f"a {HASH.upper()}", "line 1"),
        (f"a {HASH} b", "line 1"),
        ("a scala_secret", "line 1"),
        (f"a {HASH}\na {HASH[::-1]}", "'a' again"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_line_and_never_quoted(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError, match=words) as refusal:
        read_keys(path)
    assert str(path) in str(refusal.value)
    assert "scala_secret" not in str(refusal.value)
    assert HASH not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Gate.of(Settings(api_keys_file=tmp_path / "nowhere"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(tmp_path / "bytes")


def test_without_a_file_there_is_no_gate() -> None:
    assert Gate.of(Settings()) is None


def test_a_rate_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, f"a {HASH}")
    monkeypatch.setattr("server.api_keys.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'scala-serve\[rate-limit\]'"):
        Gate.of(Settings(api_keys_file=path, rate_limit="1/second"))
    assert importlib.util.find_spec("throttled") is not None


def test_a_key_is_compared_with_all_in_constant_time_whether_it_is_known_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    keys = [new_key() for _ in range(5)]
    path = written(tmp_path, "".join(f"{line_for(f'k{i}', key)}\n" for i, key in enumerate(keys)))
    gate = Gate(read_keys(path))

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr("server.api_keys.hmac", SimpleNamespace(compare_digest=compare_digest))
    for key, known in ((keys[0], True), (keys[-1], True), (new_key(), False), (keys[0][:-1], False)):
        scope = {"path": "/v1/model", "headers": [(b"authorization", f"Bearer {key}".encode())], "state": {}}
        assert (gate.refusal(scope) is None) is known
        assert compared == [32] * 5, "hashes, and each time as many"
        compared.clear()


@pytest.mark.parametrize("path", ["/livez/", "/v2/health", "/v2", "/v1/classify", "//livez", "/docs../", "/metrics"])
def test_what_resembles_an_open_path_is_not_open(path: str) -> None:
    assert not is_open(path)
