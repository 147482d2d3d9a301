"""BentoML, one worker with its one thread. Its batching takes JSON and forms, but no image as the body."""

# No `from __future__ import annotations`: BentoML looks at the classes of annotations.

import os
import sys
from pathlib import Path
from typing import Any

import bentoml

from benchmarks.peer_apps.classifier import Classifier, Options

OPTIONS_VARIABLE = "PEER_OPTIONS"  # BentoML imports this module again, in processes of its own

if OPTIONS_VARIABLE in os.environ:
    options = Options.parse(os.environ[OPTIONS_VARIABLE].split("\n"))

    @bentoml.service(workers=options.workers)
    class Service:
        def __init__(self) -> None:
            self._classifier = Classifier(options)

        @bentoml.api(route="/classify")  # type: ignore[untyped-decorator]
        def classify(self, image: Path, /) -> dict[str, Any]:
            (probabilities,) = self._classifier.run([self._classifier.decode(image.read_bytes())])
            return self._classifier.answer(probabilities)


if __name__ == "__main__":
    os.environ[OPTIONS_VARIABLE] = "\n".join(sys.argv[1:])
    arguments = ["-m", "bentoml", "serve", "benchmarks.peer_apps.bento:Service", "--host", "127.0.0.1"]
    os.execv(sys.executable, [sys.executable, *arguments, "--port", str(Options.parse().port)])
