"""What the server promises, measured on the running server with real photos.

    python -m benchmarks.first_light --data DIR [--checkpoint DIR]

1. One photo after the other with a loose budget: all in budget, at the widest width.
2. The same with a tight budget, 2 x p99 of the narrowest width + 5 ms.
3. Every answer equals offline evaluation of that photo at the width that answered.
4. Load: one budget of 200 ms, idle, at three times the widest width's capacity, and two seconds later.
5. A noisy neighbour: CPU burners beside a steady stream.

Prints what it sees and, last, one line of JSON. Everything runs on this machine's loopback and ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import uvloop
from PIL import Image

from scala_model.checkpoint import build_model, default_checkpoint, read_checkpoint
from scala_model.normalise import normalise
from scala_model.preprocess import to_pixels
from server.bench.client import Client, Reply, closed_loop, open_loop

NUM_PHOTOS = 200
BURST_S, STEADY_S = 5.0, 4.0
BURN = "import sys, time; end = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with val-*.parquet")
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    arguments = parser.parse_args()
    photos = pq.read_table(next(arguments.data.glob("val-*.parquet")))["image"].to_pylist()[:NUM_PHOTOS]
    with server(arguments.checkpoint) as port:
        results = uvloop.run(measure(port, photos, arguments.checkpoint))
    print(json.dumps({"checkpoint": arguments.checkpoint.name, "cpus": os.cpu_count(), **results}))


async def measure(port: int, photos: Sequence[bytes], checkpoint: Path) -> dict[str, Any]:
    client = Client(port)
    results: dict[str, Any] = {"ready_s": await ready(client)}
    model = (await client.get("/v1/model")).json()
    results["latency_ms"] = {w["width"]: w["latency_ms"] for w in model["widths"]}
    loose = [await client.classify(photo, {"X-Latency-Budget-Ms": "1000"}) for photo in photos]
    tight_ms = 2 * model["widths"][0]["latency_ms"]["1"]["p99"] + 5
    tight = [await client.classify(photo, {"X-Latency-Budget-Ms": f"{tight_ms}"}) for photo in photos]
    results["loose"] = show("budget 1000 ms, one by one", loose)
    results["tight"] = show(f"budget {tight_ms:.2f} ms, one by one", tight) | {"budget_ms": tight_ms}
    results["equal_to_offline"] = agreement(checkpoint, [*photos, *photos], [*loose, *tight])
    results |= await load(client, photos, model["widths"][-1]["width"])
    results["neighbour"] = await neighbour(client, photos, results["capacity"]["widest"])
    client.close()
    return results


async def load(client: Client, photos: Sequence[bytes], widest: float) -> dict[str, Any]:
    capacity = {
        name: len(await closed_loop(client, photos, {"X-Width": f"{width}"}, concurrency=16, seconds=STEADY_S))
        / STEADY_S
        for name, width in (
            ("widest", widest),
            ("narrowest", (await client.get("/v1/model")).json()["widths"][0]["width"]),
        )
    }
    print(f"capacity over HTTP, closed loop: {capacity}")
    await asyncio.sleep(3)
    budget = {"X-Latency-Budget-Ms": "200"}
    idle = [await client.classify(photo, budget) for photo in photos[:20]]
    burst = await open_loop(client, photos, budget, poisson(3 * capacity["widest"], BURST_S))
    await asyncio.sleep(2)
    after = [await client.classify(photo, budget) for photo in photos[:20]]
    return {
        "capacity": capacity,
        "idle": show("budget 200 ms, idle", idle),
        "burst": show("budget 200 ms, 3x the widest's capacity", burst),
        "after_2s": show("budget 200 ms, 2 s after the burst", after),
    }


async def neighbour(client: Client, photos: Sequence[bytes], capacity: float) -> dict[str, Any]:
    """A steady stream at 60 % of the widest's capacity, before and while other processes burn every core."""
    budget, rate = {"X-Latency-Budget-Ms": "100"}, 0.6 * capacity
    alone = await open_loop(client, photos, budget, poisson(rate, STEADY_S))
    ratio_alone = await gauge(client, "scala_interference_ratio")
    burners = [subprocess.Popen([sys.executable, "-c", BURN, str(2 * STEADY_S)]) for _ in range(os.cpu_count() or 1)]
    await asyncio.sleep(0.5)
    beside = await open_loop(client, photos, budget, poisson(rate, STEADY_S))
    ratio_beside = await gauge(client, "scala_interference_ratio")
    for burner in burners:
        burner.kill()
        burner.wait()
    return {
        "alone": show(f"{rate:.0f}/s, alone", alone) | {"interference_ratio": ratio_alone},
        "beside": show(f"{rate:.0f}/s, beside {len(burners)} CPU burners", beside)
        | {"interference_ratio": ratio_beside},
    }


def show(name: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """Print and return what became of the requests; late counts answers after their budget."""
    answered = [reply for reply in replies if reply.status == 200]
    bodies = [reply.json() for reply in answered]
    summary = {
        "requests": len(replies),
        "statuses": dict(sorted(Counter(reply.status for reply in replies).items())),
        "late": sum(not body["budget_met"] for body in bodies),
        "late_for_client": sum(1000 * r.latency_s > b["budget_ms"] for r, b in zip(answered, bodies, strict=True)),
        "mean_width": round(statistics.fmean(body["width"] for body in bodies), 3) if bodies else None,
        "widths": dict(sorted(Counter(body["width"] for body in bodies).items())),
        "latency_ms": {f"p{q}": percentile([1000 * r.latency_s for r in answered], q) for q in (50, 99)},
        "send_lag_p99_ms": percentile([1000 * reply.lag_s for reply in replies], 99),
    }
    print(f"{name}: {summary}", flush=True)
    return summary


def agreement(checkpoint: Path, photos: Sequence[bytes], replies: Sequence[Reply]) -> float:
    """Share of the answers whose top-1 is that of the sliced model, run offline at the width that answered."""
    read = read_checkpoint(checkpoint)
    model, spec = build_model(read), read.preprocessing
    pairs = [(photo, reply.json()) for photo, reply in zip(photos, replies, strict=True) if reply.status == 200]
    pixels = torch.stack([torch.from_numpy(to_pixels(Image.open(io.BytesIO(photo)), spec)) for photo, _ in pairs])
    with torch.inference_mode():
        by_width = {w: model(normalise(pixels, spec), w).argmax(-1).tolist() for w in model.config.widths}
    equal = sum(
        by_width[model.config.width(body["width"])][i] == body["predictions"][0]["class_id"]
        for i, (_, body) in enumerate(pairs)
    )
    print(f"top-1 equal to offline evaluation: {equal} of {len(pairs)}")
    return float(equal) / len(pairs)


@contextmanager
def server(checkpoint: Path) -> Iterator[int]:
    """A server process on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--checkpoint", str(checkpoint)]
    process = subprocess.Popen(command)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(60)


async def ready(client: Client) -> float:
    """Seconds until every width is warmed; ready comes earlier."""
    started = time.monotonic()
    while time.monotonic() < started + 120:
        try:
            widths = (await client.get("/v1/model")).json()["widths"]
            if all("16" in width["latency_ms"] for width in widths):
                return round(time.monotonic() - started, 1)
        except ConnectionRefusedError:
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError("the server did not become ready in two minutes")


async def gauge(client: Client, name: str) -> float:
    lines = (await client.get("/metrics")).body.decode().splitlines()
    return round(float(next(line.split()[1] for line in lines if line.startswith(f"{name} "))), 3)


def poisson(rate: float, seconds: float) -> list[float]:
    """Arrival times in seconds, the same in every run."""
    draw, now, arrivals = random.Random(0), 0.0, []
    while now < seconds:
        now += draw.expovariate(rate)
        arrivals.append(now)
    return arrivals


def percentile(values: Sequence[float], q: int) -> float | None:
    return round(sorted(values)[int(q / 100 * (len(values) - 1))], 2) if values else None


if __name__ == "__main__":
    main()
