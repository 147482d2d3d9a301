"""The manifests' 1 GiB, and images that take half of it each while they are decoded."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.chaos.callers import calling, expect_in_time, tell, warmed, well_after
from tests.chaos.conftest import Tally
from tests.service.service_process import draw_photos, serving

pytestmark = pytest.mark.service
LIMIT_BYTES = 2**30
ROUNDS, AT_ONCE = 2, 6
BUDGET_MS = 500.0


@pytest.fixture
def container() -> Iterator[list[str]]:
    """The words before a command that runs it within the limit; of control groups of version 1."""
    group = Path("/sys/fs/cgroup/memory/scala-serve-chaos")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    while group.exists():  # busy until the last thread has left
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)


def large(form: str, mode: str, pixels: int) -> bytes:
    file, side = io.BytesIO(), int(pixels**0.5)
    tile = Image.linear_gradient("L").resize((side, side))
    Image.merge(mode, [tile] * len(mode)).save(file, form, quality=50, method=0, compress_level=1)
    return file.getvalue()


def test_large_images_at_once_fit_into_a_small_container(
    tmp_path: Path, container: list[str], photos: list[bytes], tally: Tally
) -> None:
    """Two WebP images at once would take the whole of it, without a network that answers."""
    bodies = [large("WEBP", "RGB", 32_000_000), large("PNG", "RGBA", 49_000_000)]
    too_large = large("WEBP", "RGB", 49_000_000)
    photographs = draw_photos(2, size=1600)  # too many bytes to be decoded in place
    assert all(200_000 < len(photograph) < 800_000 for photograph in photographs)
    with serving(tmp_path / "log", within=container) as server, ThreadPoolExecutor(AT_ONCE) as threads:
        warmed(server)

        def classify(place: int) -> int:
            headers = {"X-Latency-Budget-Ms": "60000"}
            return server.http.post("/v1/classify", content=bodies[place % len(bodies)], headers=headers).status_code

        with calling(server, photos, BUDGET_MS) as seen, calling(server, photographs, BUDGET_MS, callers=1) as others:
            statuses = Counter(threads.map(classify, range(ROUNDS * AT_ONCE)))
            refusal = server.http.post("/v1/classify", content=too_large)
            recovery_s = well_after(server, photos[0])
    tell(tally, "the same, for photographs of half a megabyte", others, recovery_s)
    tell(tally, f"1 GiB of memory, {AT_ONCE} images at once that take half of it each", seen, recovery_s)
    tally.requests(statuses.total(), 0)
    assert statuses == {200: ROUNDS * AT_ONCE}
    assert refusal.status_code == 413
    assert "MiB for that" in refusal.json()["detail"]
    for bystanders in (seen, others):
        assert set(bystanders.statuses) <= {200, 429, 504}, bystanders
        assert bystanders.statuses[200] > 0.8 * len(bystanders.replies), bystanders
        expect_in_time(bystanders)
