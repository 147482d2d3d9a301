"""Whether a server that was attacked is well."""

from __future__ import annotations

import time
from pathlib import Path

from tests.service.service_process import Running

# A plan is made by a process of the lowest priority in half a minute: beside an attack, now and then, it is not.
WELL_S = 5.0  # measured 0.01 to 0.3
HARMLESS = "no new plan could be made"


def healthy_after(server: Running, photo: bytes) -> float:
    """Seconds until the server is ready and answers a good photo, which it has to soon."""
    started = time.monotonic()
    while server.http.post("/v1/classify", content=photo).status_code != 200:
        assert time.monotonic() - started < WELL_S, "the server is not well again"
        time.sleep(0.005)
    assert server.http.get("/readyz").status_code == 200
    return time.monotonic() - started


def check_log(log: Path) -> None:
    """No attack may end in what the server takes for its own fault, nor write a line that is none of its log."""
    lines = log.read_text(errors="replace").splitlines()
    faults = [line for line in lines if " ERROR " in line and HARMLESS not in line]
    assert not faults, "\n".join(faults)[:5000]
    foreign = [line for line in lines if line and not line.startswith(("2", "  "))]
    assert not foreign, "\n".join(foreign)[:5000]
