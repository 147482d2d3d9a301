"""Throws hostile bytes at the decoder, in a process of its own: a crash of native code is then seen and harms nobody.

``python -m tests.chaos.attack_decoder guided FOLDER RUNS SECONDS`` follows the coverage of Pillow's and our own Python
(atheris), ``... invented COUNT`` lets hypothesis choose. Both end with the number of inputs tried as one object of
JSON; anything but an answer of the decoder's contract ends them with a traceback and another exit code than 0.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

SLOWEST_S = 5.0  # of one image on a busy machine: 16 million pixels, the most below, take half a second on an idle one
MAX_PIXELS = 4096 * 4096


@dataclass
class Attempts:
    """The decoder's answers, counted by kind."""

    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        from scala_model.preprocess import Preprocessing
        from server.decode import ImageDecoder

        self.decoder = ImageDecoder(Preprocessing(48), MAX_PIXELS)

    def attempt(self, body: bytes) -> None:
        started = time.monotonic()
        answer = self._answer(body)
        assert time.monotonic() - started < SLOWEST_S, f"slow: {_shown(body)}"
        self.seen[answer] += 1

    def _answer(self, body: bytes) -> str:
        from server.errors import BadRequest, BrokenImage, TooLarge, UnsupportedImage

        answers = []
        for decode in (self.decoder.if_small, self.decoder):  # in this order, as requests go
            try:
                pixels = decode(body)
                assert pixels is None or (pixels.shape, pixels.dtype) == ((48, 48, 3), np.uint8), _shown(body)
                answers.append("none" if pixels is None else "pixels")
            except (BadRequest, BrokenImage, TooLarge, UnsupportedImage) as error:
                answers.append(type(error).__name__)
        assert answers[0] in ("none", answers[1]), f"{answers}: {_shown(body)}"
        return answers[1]

    def tell(self) -> None:
        print(json.dumps({"inputs": self.seen.total(), "answers": dict(self.seen)}), flush=True)


def _shown(body: bytes) -> str:
    """What can be tried again, or at least told apart."""
    return body.hex() if len(body) < 4000 else f"{len(body)} bytes, SHA-256 {hashlib.sha256(body).hexdigest()}"


def guided(folder: Path, runs: int, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["PIL", "server.decode", "scala_model.preprocess"]):
        attempts = Attempts()
    from tests.chaos.hostile_images import WRONGS, bombs, samples

    for body in (*samples(), *bombs()):
        (folder / hashlib.sha256(body).hexdigest()).write_bytes(body)

    def mutated(body: bytes, max_size: int, seed: int) -> bytes:
        """Half of the time as a format's parser would least like it, half of the time as libFuzzer does."""
        random = Random(seed)
        if random.random() < 0.5:
            return random.choice(WRONGS)(random, body)[:max_size]
        return bytes(atheris.Mutate(body, len(body)))[:max_size]

    count = 0

    def attempt(body: bytes) -> None:
        nonlocal count
        attempts.attempt(body)
        count += 1
        if count == runs:
            attempts.tell()  # libFuzzer ends the process without a word to Python

    options = ["-seed=1", f"-runs={runs}", f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048"]
    atheris.Setup(["attack", *options, "-max_len=65536", str(folder)], attempt, custom_mutator=mutated)
    atheris.Fuzz()


def invented(count: int) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from tests.chaos.hostile_images import bombs, hostile_image

    attempts = Attempts()
    for body in bombs():
        attempts.attempt(body)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def attempt(random: Random) -> None:
        attempts.attempt(hostile_image(random, bomb_share=0))

    attempt()
    attempts.tell()


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    if kind == "guided":
        guided(Path(arguments[0]), int(arguments[1]), int(arguments[2]))
    else:
        invented(int(arguments[0]))
