"""BentoML with its adaptive batching, one worker."""

# No `from __future__ import annotations`: BentoML looks at the classes of annotations.

import os
import sys
from pathlib import Path
from typing import Any

import bentoml

from benchmarks.peer_apps.classifier import Classifier, Options

OPTIONS_VARIABLE = "PEER_OPTIONS"  # BentoML imports this module again, in processes of its own
MAX_LATENCY_MS = 10_000

if OPTIONS_VARIABLE in os.environ:
    options = Options.parse(os.environ[OPTIONS_VARIABLE].split("\n"))

    @bentoml.service(workers=options.workers, traffic={"timeout": 60})
    class Service:
        def __init__(self) -> None:
            self._classifier = Classifier(options)

        @bentoml.api(batchable=True, max_batch_size=options.max_batch, max_latency_ms=MAX_LATENCY_MS, route="/classify")
        def classify(self, images: list[Path]) -> list[dict[str, Any]]:
            pixels = [self._classifier.decode(image.read_bytes()) for image in images]
            return [self._classifier.answer(row) for row in self._classifier.run(pixels)]


if __name__ == "__main__":
    os.environ[OPTIONS_VARIABLE] = "\n".join(sys.argv[1:])
    arguments = ["-m", "bentoml", "serve", "benchmarks.peer_apps.bento:Service", "--host", "127.0.0.1"]
    os.execv(sys.executable, [sys.executable, *arguments, "--port", str(Options.parse().port)])
