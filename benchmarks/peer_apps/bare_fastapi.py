"""A bare FastAPI handler: one image after the other through one engine behind a lock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import Body, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from benchmarks.peer_apps.classifier import Classifier, Options

FORMS = ("inline", "thread", "sync")  # decoded on the event loop, all work in a thread, a handler that is no coroutine


def make_app(classifier: Classifier, form: str) -> FastAPI:
    """Raises ValueError for an unknown form."""
    app, turn, lock = FastAPI(), asyncio.Lock(), threading.Lock()

    async def inline(request: Request) -> JSONResponse:
        pixels = classifier.decode(await request.body())
        async with turn:
            (probabilities,) = await run_in_threadpool(classifier.run, [pixels])
        return JSONResponse(classifier.answer(probabilities))

    def work(body: bytes) -> dict[str, Any]:
        pixels = classifier.decode(body)
        with lock:
            (probabilities,) = classifier.run([pixels])
        return classifier.answer(probabilities)

    async def thread(request: Request) -> JSONResponse:
        return JSONResponse(await run_in_threadpool(work, await request.body()))

    def sync(body: bytes = Body(media_type="image/jpeg")) -> JSONResponse:
        return JSONResponse(work(body))

    forms: dict[str, Callable[..., Any]] = {"inline": inline, "thread": thread, "sync": sync}
    if form not in forms:
        raise ValueError(f"form is {form!r}: give one of {', '.join(forms)}")
    app.post("/classify", response_model=None)(forms[form])
    return app


if __name__ == "__main__":
    options = Options.parse()
    uvicorn.run(make_app(Classifier(options), options.form), port=options.port, access_log=False, log_level="warning")
