"""Large images at once: what the server's process holds at most, and what it keeps."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.service.service_process import Running, serving

pytestmark = pytest.mark.service

PILLOW_MIB = 40 * 10**6 * 4 / 2**20  # of an image of 40 million pixels


def mib(running: Running, what: str) -> float:
    """``VmRSS``, resident now, or ``VmHWM``, at most since it was set back."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def transparent_png() -> bytes:
    tile = np.random.default_rng(0).integers(0, 256, (80, 125, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(tile).resize((8000, 5000), Image.Resampling.NEAREST).save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_two_large_images_at_once_take_no_more_than_pillow_holds_of_them(tmp_path: Path) -> None:
    """As RGBA, and as RGB on white, each would be held twice more."""
    body = transparent_png()
    with serving(tmp_path / "log") as running:
        running.wait_measured()
        before = mib(running, "VmRSS")
        Path(f"/proc/{running.process.pid}/clear_refs").write_text("5")  # sets VmHWM back
        with ThreadPoolExecutor(2) as threads:
            patient = {"X-Latency-Budget-Ms": "60000"}
            ask = partial(running.http.post, "/v1/classify", content=body, headers=patient)
            replies = list(threads.map(lambda _: ask(), range(2)))
        assert [reply.status_code for reply in replies] == [200, 200]
        most = mib(running, "VmHWM") - before
        assert PILLOW_MIB < most < 2 * PILLOW_MIB + 60
        assert mib(running, "VmRSS") - before < 60, "it is given back"
