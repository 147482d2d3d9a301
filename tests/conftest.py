"""Where the tests find data that is not part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


def _data_dir() -> Path:
    """``SCALA_DATA_DIR``, relative to the repository's root; by default ``../shared/data``."""
    return (REPO_ROOT / os.environ.get("SCALA_DATA_DIR", "../shared/data")).resolve()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set SCALA_DATA_DIR to run this test")
    return folder


@pytest.fixture(autouse=True)
def _no_profile_of_another_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server measures is kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets (``tiny-imagenet/``) and request traces (``traces/``)."""
    return _existing(_data_dir())


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of logits that the published implementation gave, one file a variant."""
    return _existing(_data_dir().parent / "golden")
