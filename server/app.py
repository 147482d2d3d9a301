"""The composition root: every part is made and joined here, and nowhere else."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan

from scala_model.checkpoint import Checkpoint, default_checkpoint, read_checkpoint
from scala_model.width import Width
from server.admission import Admission
from server.api_keys import Gate
from server.decision_log import DecisionLog
from server.decode import ImageDecoder
from server.device import Device
from server.edge import Edge, Endpoint, answer_error
from server.engine import engine_of
from server.engine.contract import Engine
from server.errors import RequestError
from server.gpu import GpuCollector
from server.large_images import SHARE, LargeImages
from server.latency_profile import LatencyProfile
from server.lifecycle import Lifecycle
from server.load_monitor import DEMAND_TAU_S, DecayingRate, LoadMonitor
from server.machine import MachineReader, memory_limit_bytes
from server.metrics import Metrics
from server.planner import Planner
from server.policies import Policy, fixed_width, policy_of
from server.policies.adaptive import Adaptive
from server.profile_store import Key, ProfileStore, Table, default_folder
from server.pulse import Pulse
from server.quote import QuoteBook
from server.request_queue import RequestQueue
from server.routes import classify, events, health, model, oip, pages, quote
from server.routes import settings as settings_route
from server.routes.openapi import ANSWER_HEADERS, document
from server.schemas import EffectiveSettings
from server.serve_loop import RESTARTING, ServeLoop
from server.services import Services
from server.settings import Settings, SettingsError
from server.threads import started_pool
from server.tolerated import Tolerated
from server.tracing import tracer_of

if TYPE_CHECKING:
    from server.spans import Tracer

SAMPLE_EVERY_S = 0.2
log = logging.getLogger("scala.serve")


def build_app(settings: Settings) -> tuple[ASGIApp, Services]:
    """The application for these settings, its checkpoint read and verified, its engine not loaded yet.

    Raises CheckpointError and SettingsError.
    """
    checkpoint = read_checkpoint(settings.checkpoint or default_checkpoint())
    machine = MachineReader()
    tracer = tracer_of(os.environ)
    return assemble(settings, checkpoint, engine_of(settings, checkpoint, machine.cpus), machine, tracer)


def assemble(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine,
    machine: MachineReader,
    tracer: Tracer | None = None,
) -> tuple[ASGIApp, Services]:
    """The application around any engine. Raises SettingsError for a policy that the checkpoint cannot follow."""
    measured = {checkpoint.config.width(entry["width"]): entry["accuracy"] for entry in checkpoint.card["widths"]}
    try:
        policy, fixed = policy_of(settings.policy), fixed_width(settings.policy, checkpoint.config.widths)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    lifecycle, metrics, monitor, queue = Lifecycle(), Metrics(), LoadMonitor(), RequestQueue()
    profile = LatencyProfile(measured, engine.max_batch)
    device = Device(engine, lifecycle, checkpoint.config.num_classes)
    admission = Admission(
        queue,
        profile,
        monitor,
        device,
        max_images=settings.max_queue,
        max_body_bytes=settings.max_body_bytes,
        fixed=fixed,
    )
    decision_log = _decision_log(settings, checkpoint, profile, metrics)
    planner = _planner(settings, policy, fixed, profile, monitor, decision_log)
    num_decoders = max(2, int(machine.cpus))  # one of them always free of large images
    services = Services(
        settings=_effective(settings, checkpoint, engine),
        checkpoint=replace(checkpoint, weights={}),  # the engine's alone, to be freed once it has made its own of them
        lifecycle=lifecycle,
        metrics=metrics,
        profile=profile,
        monitor=monitor,
        queue=queue,
        admission=admission,
        device=device,
        serve_loop=ServeLoop(
            device,
            policy,
            queue,
            profile,
            monitor,
            admission,
            lifecycle,
            metrics,
            checkpoint.config.image_size,
            planner,
            None if decision_log is None else decision_log.decided,
        ),
        policy=policy,
        planner=planner,
        decision_log=decision_log,
        quotes=QuoteBook(),
        pulse=Pulse(),
        decoder=ImageDecoder(checkpoint.preprocessing, settings.max_pixels),
        decoders=started_pool(num_decoders, "decode"),
        decoder_turns=asyncio.Semaphore(num_decoders),
        large_images=LargeImages(num_decoders // 2, SHARE * memory_limit_bytes()),
        labels=tuple(str(entry["label"]) for entry in checkpoint.card["classes"]),
        measured_accuracy=measured,
        tracer=tracer,
    )
    return _http(settings, services, engine, machine), services


def _http(settings: Settings, services: Services, engine: Engine, machine: MachineReader) -> ASGIApp:
    """The routes and all that lies around them, from the innermost to the outermost. Raises SettingsError."""
    app = FastAPI(
        title="scala-serve",
        version=version("scala-serve"),
        description="Image classification that never takes longer than asked.",
        lifespan=_lifespan(services, engine, machine),
        docs_url=None,  # the page itself is ours, for its headers: see routes/pages.py
        redoc_url=None,
        redirect_slashes=False,  # to wherever the request's Host header says
    )
    for routes in (classify, quote, events, health, model, settings_route, oip, pages):
        app.include_router(routes.router)
    for kind in (RequestError, HTTPException, RequestValidationError, MemoryError, Exception):
        app.add_exception_handler(kind, answer_error)
    gate = Gate.of(settings)
    name, widths = services.settings.model_name, [*map(float, services.measured_accuracy)]
    document(app, model=name, num_classes=len(services.labels), widths=widths, keys=gate is not None)
    hot: dict[tuple[str, str], tuple[str, Endpoint]] = {
        ("POST", path): (route, oip.infer) for path, route in oip.infer_paths(name).items()
    }
    hot["POST", "/v1/classify"] = ("/v1/classify", classify.classify)
    return Edge(app, services, hot, gate, _for_pages_of(settings.cors_origins))


def _effective(settings: Settings, checkpoint: Checkpoint, engine: Engine) -> EffectiveSettings:
    """What was left to the machine and the package, filled in."""
    found = {
        "checkpoint": settings.checkpoint or default_checkpoint(),
        "model_name": settings.model_name or checkpoint.card["name"],
        "engine": engine.name,
        "device": engine.device,
        "num_threads": engine.threads,
        "max_batch": engine.max_batch,
        "profile_dir": settings.profile_dir or default_folder(),
        "tls_key_password": settings.tls_key_password and str(settings.tls_key_password),
    }
    return EffectiveSettings(**(settings.model_dump() | found))


class _Cors(CORSMiddleware):
    """Repeats nothing of what a stranger asks for."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        response.headers["Access-Control-Allow-Headers"] = "*, Authorization"  # which the star leaves out
        return response


def _for_pages_of(origins: Sequence[str] | None) -> Callable[[ASGIApp], ASGIApp] | None:
    """Lets pages of other origins call the server: lies around all that answers, for them to read errors, too."""
    if not origins:
        return None
    return partial(
        _Cors,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),  # nothing is done for a cookie, so there is no header to keep from a page
        expose_headers=ANSWER_HEADERS,
    )


def _planner(
    settings: Settings,
    policy: Policy,
    fixed: Width | None,
    profile: LatencyProfile,
    monitor: LoadMonitor,
    decision_log: DecisionLog | None,
) -> Planner | None:
    if not isinstance(policy, Adaptive):
        return None
    return Planner(
        policy,
        profile,
        monitor,
        profile.widths if fixed is None else (fixed,),
        settings.default_budget_ms / 1000,
        settings.max_queue,
        None if decision_log is None else decision_log.planned,
    )


def _decision_log(
    settings: Settings, checkpoint: Checkpoint, profile: LatencyProfile, metrics: Metrics
) -> DecisionLog | None:
    if settings.decision_log is None:
        return None
    return DecisionLog(
        settings.decision_log,
        settings.decision_log_bytes,
        model=checkpoint.card["name"],
        policy=settings.policy,
        profile=profile,
        dropped=metrics.decision_log_dropped.inc,
    )


def _lifespan(services: Services, engine: Engine, machine: MachineReader) -> Lifespan[FastAPI]:
    """Listening begins at once; the engine is loaded and warmed beside it, and ``/readyz`` tells when."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        _export(services, engine)
        if services.decision_log is not None:
            services.decision_log.start()
        tasks = [
            asyncio.create_task(work)
            for work in (
                _start(services, engine),
                services.serve_loop.serve(),
                _watch(services, engine, machine),
                services.pulse.keep(services),
            )
        ]
        if services.planner is not None:
            tasks.append(asyncio.create_task(services.planner.keep_fresh()))
        for task in tasks:
            task.add_done_callback(lambda done: _note_failure(services, done))
        yield
        for task in tasks:
            task.cancel()
        services.serve_loop.close()
        if services.decision_log is not None:
            services.decision_log.close()
        services.decoders.shutdown(wait=False, cancel_futures=True)
        if services.tracer is not None:
            services.tracer.close()

    return lifespan


async def _start(services: Services, engine: Engine) -> None:
    """Bring the engine up with what an earlier start measured, or keep for the next what this one does."""
    store = ProfileStore(services.settings.profile_dir or default_folder())
    key = Key.of(engine, services.checkpoint.card["weights_sha256"])
    table = store.read(key)
    log.info("latencies of earlier starts: %s", store.path(key) if table else "none")
    await services.serve_loop.start(table)
    gc.collect()
    gc.freeze()  # a full collection would walk over all that was imported: 20 to 50 ms, in which nobody is answered
    if services.serve_loop.measured_anew and len(services.profile.samples()) > 2:
        store.write(Table.of(key, services.profile.samples()))


def _note_failure(services: Services, task: asyncio.Task[None]) -> None:
    """One of the server's own tasks ended by an error: nobody is served any more, and those who wait hear so."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended: %r", task.get_coro(), error, exc_info=error)
        services.lifecycle.fail(str(error) or type(error).__name__)
        services.serve_loop.drop_all(RESTARTING)


async def _watch(services: Services, engine: Engine, machine: MachineReader) -> None:
    """Look at the machine and at the event loop, in whose thread this runs, a few times a second."""
    gauge = services.metrics.gauge
    cpu_load = gauge("cpu_load_ratio", "Share of all cores that is busy")
    throttled = gauge("cpu_throttled_ratio", "Share of scheduling periods in which the cgroup was throttled")
    memory = gauge("memory_bytes", "Resident memory of the process")
    lag = gauge("event_loop_lag_seconds", "How late the event loop last woke up")
    loop_busy = gauge("event_loop_busy_ratio", "Share of one core that the event loop's thread takes, smoothed")
    used, used_s = DecayingRate(DEMAND_TAU_S), time.thread_time()
    reading = Tolerated("the machine's load", "read")
    while True:
        due = time.monotonic() + SAMPLE_EVERY_S
        await asyncio.sleep(SAMPLE_EVERY_S)
        lag.set(max(0.0, time.monotonic() - due))
        used.add(time.thread_time() - used_s, time.monotonic())
        used_s = time.thread_time()
        loop_busy.set(used.value(time.monotonic()))
        with reading:
            sample = machine.sample()
            services.monitor.see_machine(sample.others_cores, engine.threads, machine.host_cpus, sample.throttled)
            cpu_load.set(sample.cpu_load)
            throttled.set(sample.throttled)
            memory.set(sample.memory_bytes)


def _export(services: Services, engine: Engine) -> None:
    """The gauges that are read from live values at scrape time, and the three that never change."""
    monitor, admission, lifecycle = services.monitor, services.admission, services.lifecycle
    large, now = services.large_images, time.monotonic
    gauges: dict[tuple[str, str], Callable[[], float]] = {
        ("queue_depth", "Images decoded and waiting"): lambda: len(services.queue),
        ("inflight_bytes", "Bytes of request bodies held"): lambda: admission.inflight_bytes,
        ("decoding_bytes", "Memory that large images take while they are decoded"): lambda: large.held_bytes,
        ("interference_ratio", "Observed over profiled latency"): lambda: monitor.interference(now()),
        ("prediction_error_ratio", "Observed over predicted latency, smoothed"): lambda: monitor.prediction_error,
        ("engine_busy_ratio", "Share of time the engine runs"): lambda: min(1.0, monitor.busy.value(now())),
        ("expected_accuracy_ratio", "Expected top-1 of recent answers, smoothed"): services.expected_accuracy,
        ("accuracy_debt_points", "Percentage points given away for load, smoothed"): services.accuracy_debt,
        ("full_width_demand_ratio", "Device time a second for all arrivals at full width"): services.full_width_demand,
        ("ready", "1 while new requests are wanted: warmed, not draining, engine healthy"): lambda: lifecycle.ready,
        ("memory_limit_bytes", "What the process may use"): memory_limit_bytes,
        ("gpu_memory_bytes", "Device memory held by the engine"): engine.memory_bytes,
    }
    memory_limit_bytes()  # reads what it keeps, while a file can be opened; and so do the pages
    pages.read_all()
    for (name, text), read in gauges.items():
        services.metrics.gauge(name, text).set_function(read)
    services.metrics.registry.register(GpuCollector())
    for width in services.profile.widths:  # so that a rate sees the first image at a width
        services.metrics.width_selected.labels(str(width))
    services.metrics.gauge("start_time_seconds", "When the server started, since 1970").set(time.time())
    name, weights = services.settings.model_name, services.checkpoint.card["weights_sha256"]
    services.metrics.model_info.labels(name, weights).set(1)
    services.metrics.build_info.labels(version("scala-serve"), engine.name).set(1)
