"""The server that all service tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.service_process import Running, draw_photos, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that leave it as they found it, with every width warmed."""
    with serving(tmp_path_factory.mktemp("server") / "log") as running:
        running.wait_measured()
        yield running


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    return draw_photos(40)
