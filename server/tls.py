"""HTTPS: uvicorn's options, from files that were tried before anything listens."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import uvloop

from server.settings import Settings, SettingsError

HANDSHAKE_S = 5.0  # asyncio's own 60 s would be a minute in which handshakes that stop keep all open files


class Loop(uvloop.Loop):
    """With a limit on handshakes, for which uvicorn has no option."""

    async def create_server(self, *args: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_S
        return await super().create_server(*args, **options)


def tls_options(settings: Settings) -> dict[str, Any]:
    """Of ``uvicorn.Config``; none without a certificate. Raises SettingsError for files that cannot be used."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        return {}
    secret = settings.tls_key_password
    password = None if secret is None else secret.get_secret_value()
    for name, path in (("tls_cert", cert), ("tls_key", key), ("tls_client_ca", client_ca)):
        _check_readable(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, lambda: password or "")  # "": OpenSSL would ask whoever is at the terminal
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(
            f"tls_cert {cert} and tls_key {key} cannot be used ({_reason(error)}): they must be a certificate and its "
            "private key, both PEM; the password of an encrypted key is tls_key_password"
        ) from None
    try:
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except ssl.SSLError as error:
        raise SettingsError(
            f"tls_client_ca {client_ca} cannot be used ({_reason(error)}): it must hold certificates, PEM"
        ) from None
    return {
        "loop": f"{Loop.__module__}:{Loop.__name__}",
        "ssl_certfile": cert,
        "ssl_keyfile": key,
        "ssl_keyfile_password": password,
        "ssl_ca_certs": client_ca,
        "ssl_cert_reqs": ssl.CERT_NONE if client_ca is None else ssl.CERT_REQUIRED,
    }


def _check_readable(name: str, path: Path | None) -> None:
    try:
        if path is not None:
            path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name} {path} cannot be read: {error.strerror}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
