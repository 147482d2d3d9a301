"""Certificates: which files are refused before anything listens, and with which words."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from server.settings import Settings, SettingsError
from server.tls import tls_options


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cert.pem, key.pem, locked.pem (the same key, its password ``open``), ca.pem and other.pem."""
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    issued = ca.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    ca.issue_cert("localhost").private_key_pem.write_to_path(folder / "other.pem")
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    encoding, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "locked.pem").write_bytes(
        key.private_bytes(encoding, kind, serialization.BestAvailableEncryption(b"open"))
    )
    return folder


def settings(files: Path, **given: str) -> Settings:
    paths = {name: files / value for name, value in given.items() if name != "tls_key_password"}
    return Settings.model_validate(given | paths)


def test_without_a_certificate_there_are_no_options() -> None:
    assert tls_options(Settings()) == {}


def test_the_options_are_those_of_uvicorn(files: Path) -> None:
    options = tls_options(settings(files, tls_cert="cert.pem", tls_key="key.pem"))
    assert (options["ssl_cert_reqs"], options["ssl_ca_certs"]) == (ssl.CERT_NONE, None)
    options = tls_options(settings(files, tls_cert="cert.pem", tls_key="key.pem", tls_client_ca="ca.pem"))
    assert (options["ssl_cert_reqs"], options["ssl_ca_certs"]) == (ssl.CERT_REQUIRED, files / "ca.pem")


def test_an_encrypted_key_needs_its_password(files: Path) -> None:
    locked = {"tls_cert": "cert.pem", "tls_key": "locked.pem"}
    options = tls_options(settings(files, **locked, tls_key_password="open"))
    assert options["ssl_keyfile_password"] == "open"
    for wrong in ({}, {"tls_key_password": "shut"}):
        with pytest.raises(SettingsError, match="password of an encrypted key") as refusal:
            tls_options(settings(files, **locked, **wrong))
        assert "shut" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tls_cert": "nowhere.pem", "tls_key": "key.pem"}, "tls_cert .*nowhere.pem cannot be read: No such file"),
        ({"tls_cert": "cert.pem", "tls_key": "."}, "tls_key .* cannot be read: Is a directory"),
        ({"tls_cert": "cert.pem", "tls_key": "other.pem"}, r"cannot be used \(KEY_VALUES_MISMATCH\)"),
        ({"tls_cert": "key.pem", "tls_key": "key.pem"}, "must be a certificate and its private key"),
        ({"tls_cert": "cert.pem", "tls_key": "key.pem", "tls_client_ca": "key.pem"}, "must hold certificates"),
    ],
)
def test_files_that_cannot_be_used_are_named(files: Path, given: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        tls_options(settings(files, **given))
