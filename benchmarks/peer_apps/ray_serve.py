"""Ray Serve with its batching, one replica: HTTP in Ray's proxy, all else in the replica."""

# No `from __future__ import annotations`: Ray Serve looks at the classes of annotations.

import asyncio
import threading
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from starlette.requests import Request

from benchmarks.peer_apps.classifier import Classifier, Options

MAX_ONGOING = 64  # requests in the replica: more than there are callers


def make_deployment(options: Options) -> Any:
    @serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    class Deployment:
        def __init__(self) -> None:
            self._classifier = Classifier(options)

        @serve.batch(max_batch_size=options.max_batch, batch_wait_timeout_s=options.batch_wait_ms / 1000)  # type: ignore[untyped-decorator]
        async def run(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
            return list(await asyncio.to_thread(self._classifier.run, images))

        async def __call__(self, request: Request) -> dict[str, Any]:
            pixels = self._classifier.decode(await request.body())
            return self._classifier.answer(await self.run(pixels))

    return Deployment.bind()  # type: ignore[attr-defined]


if __name__ == "__main__":
    options = Options.parse()
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(make_deployment(options), route_prefix="/classify")
    threading.Event().wait()
