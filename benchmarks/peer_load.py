"""Load in closed loop by wrk, which takes next to nothing of the cores that it shares with the server."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer_servers import Running

CALLERS, TIMEOUT_S = 16, 30
SETTLE_S = 0.5  # for what wrk left behind: an engine that is halted at work is taken for one that hangs
SCRIPT = """
function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method, wrk.body = "POST", file:read("*a")
  file:close()
  for i = 2, #args, 2 do wrk.headers[args[i]] = args[i + 1] end
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "failed": %d, "p50_ms": %.3f, "p99_ms": %.3f}',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one server did in one turn. ``failed`` requests are no answers, or none of status 200 to 399."""

    rate: float
    failed: int
    cpu_ms: float
    p50_ms: float
    p99_ms: float


def play(server: Running, image: Path, script: Path, seconds: int) -> Turn:
    """``CALLERS`` callers, each sending its next request when the last was answered. The server is let go, and halted
    again.

    Raises RuntimeError when wrk fails, ValueError when nothing is answered.
    """
    server.go_on()
    before = server.cpu_s()
    headers = [word for header in {"Content-Type": "image/jpeg", **server.headers}.items() for word in header]
    command = ["wrk", "-t1", f"-c{CALLERS}", f"-d{seconds}s", f"--timeout={TIMEOUT_S}s", "-s", str(script)]
    ran = subprocess.run(
        [*command, server.url, "--", str(image), *headers], capture_output=True, text=True, check=False
    )
    after = server.cpu_s()
    time.sleep(SETTLE_S)
    server.halt()
    if ran.returncode != 0 or not ran.stdout:
        raise RuntimeError(f"wrk failed: {ran.stderr.strip() or ran.stdout.strip()}")
    return turn_of(ran.stdout.splitlines()[-1], after - before)


def turn_of(line: str, cpu_s: float) -> Turn:
    """From the last line that wrk's script prints. Raises ValueError when nothing was answered."""
    told = json.loads(line)
    answered = told["requests"] - told["failed"]
    if answered <= 0:
        raise ValueError(f"none of {told['requests']} requests was answered")
    return Turn(
        rate=answered / told["seconds"],
        failed=told["failed"],
        cpu_ms=1000 * cpu_s / told["requests"],
        p50_ms=told["p50_ms"],
        p99_ms=told["p99_ms"],
    )
