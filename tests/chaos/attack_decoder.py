"""Throws hostile bytes at the decoder, in a process of its own: a crash of native code is then seen and harms nobody.

``python -m tests.chaos.attack_decoder guided FOLDER RUNS SECONDS`` follows the coverage of Pillow's and our own Python
(atheris), ``... chosen COUNT`` lets hypothesis choose, ``... random COUNT`` lets chance, ten times as fast. All end
with what was answered as one object of JSON on standard output; anything but an answer of the decoder's contract ends
them with a traceback there and another exit code than 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from tests.chaos.seed import SEED

SLOWEST_S = 2.0  # of computing, for one image twice: the most pixels, 16 million, take a quarter
MAX_PIXELS = 4096 * 4096


@dataclass
class Attempts:
    """The decoder's answers, counted by kind."""

    seen: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def __post_init__(self) -> None:
        from scala_model.preprocess import Preprocessing
        from server.decode import ImageDecoder

        self.decoder = ImageDecoder(Preprocessing(48), MAX_PIXELS)

    def attempt(self, body: bytes) -> None:
        started = time.process_time()  # the machine has other work, too
        answer = self._answer(body)
        self.slowest_s = max(self.slowest_s, time.process_time() - started)
        assert self.slowest_s < SLOWEST_S, f"slow: {_shown(body)}"
        self.seen[answer] += 1

    def _answer(self, body: bytes) -> str:
        from server.errors import BadRequest, BrokenImage, TooLarge, UnsupportedImage

        answers = []
        for decode in (self.decoder.if_small, self.decoder):  # in this order, as requests go
            try:
                pixels = decode(body)
                assert pixels is None or (pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8), _shown(body)
                answers.append("none" if pixels is None else "pixels")
            except (BadRequest, BrokenImage, TooLarge, UnsupportedImage) as error:
                answers.append(type(error).__name__)
        assert answers[0] in ("none", answers[1]), f"{answers}: {_shown(body)}"
        return answers[1]

    def tell(self) -> None:
        print(
            json.dumps({"inputs": self.seen.total(), "answers": dict(self.seen), "slowest_s": self.slowest_s}),
            flush=True,
        )


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

    ends = time.monotonic() + seconds

    def attempt(body: bytes) -> None:
        attempts.attempt(body)
        if attempts.seen.total() == runs or time.monotonic() > ends:
            attempts.tell()
            os._exit(0)  # libFuzzer would end the process without a word to Python

    options = [f"-seed={SEED}", "-timeout=20", "-rss_limit_mb=2048"]
    atheris.Setup(["attack", *options, "-max_len=8192", str(folder)], attempt, custom_mutator=mutated)
    atheris.Fuzz()


def chosen(count: int) -> None:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    from tests.chaos.hostile_images import hostile_image

    attempts = Attempts()

    @seed(SEED)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def attempt(random: Random) -> None:
        attempts.attempt(hostile_image(random, bomb_share=0.001))

    attempt()
    attempts.tell()


def by_chance(count: int) -> None:
    from tests.chaos.hostile_images import bombs, hostile_image

    attempts, random = Attempts(), Random(SEED)
    for body in bombs():
        attempts.attempt(body)
    for _ in range(count - len(bombs())):
        attempts.attempt(hostile_image(random, bomb_share=0.001))
    attempts.tell()


def main(kind: str, *arguments: str) -> None:
    if kind == "guided":
        folder, runs, seconds = arguments
        guided(Path(folder), int(runs), int(seconds))
    else:
        {"chosen": chosen, "random": by_chance}[kind](int(*arguments))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc(file=sys.stdout)  # libtiff fills the other with its remarks
        sys.exit(1)
