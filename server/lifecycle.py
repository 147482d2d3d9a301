"""From start to exit: starting, ready, draining, refusing, gone.

SIGTERM, SIGINT or SIGHUP: not ready at once, new requests are still served for the grace period (the balancer needs
time to notice), then refused; the process leaves with 0 when none is in flight, or after the drain timeout, when those
who still upload or wait hear 503. Every answer closes its connection meanwhile, so that callers with a connection of
their own go elsewhere too. A server that is not ready yet, so that nobody was sent to it, has no grace period. A second
SIGTERM or SIGINT leaves now. An engine that hangs or keeps failing leaves with 70 (``EX_SOFTWARE``), for the supervisor
to restart.

Native code that keeps the interpreter's lock stands still the event loop, and with it every watchdog written in Python.
The last one is C: after a minute without a turn of the event loop it writes where each thread is to standard error, and
leaves with 1, the only code it can. It also ends a process that was stopped for longer, when that goes on. Each turn
takes a new thread: where the system gives none, the server goes on without this watchdog until there is one.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import uvicorn

from server.errors import Unavailable
from server.threads import started_pool
from server.tolerated import Tolerated

if TYPE_CHECKING:
    from server.connection import Connection, Doorkeeper
    from server.settings import Settings

EX_SOFTWARE = 70
STDERR = 2
NUM_HELPERS = 4  # threads for what takes long and is no decoding: plans, long answers
STANDSTILL_S = 60.0  # of the event loop
FAREWELL_S = 0.5
# After the grace: it leaves once nobody has come for the first, and comes they ever so often after the second.
QUIET_S, LAST_CALL_S = 0.25, 1.0
TICKS_A_SECOND = 10
SHUTDOWN_S = 1.3  # what uvicorn may take to close its connections
# How long a thread that wants the interpreter waits for a busy event loop: decoders and the engine ask a few times an
# image, and Python's 5 ms would each time be the most of a tight budget.
SWITCH_INTERVAL_S = 0.0002
log = logging.getLogger("scala.serve")


class Lifecycle:
    """The one place that knows whether the server takes requests; ``in_flight`` have a head but no answer yet.

    ``unanswered`` are the tasks of those whose answer has not even begun.
    """

    def __init__(self) -> None:
        self.started = False
        self.draining = False
        self.refusing = False
        self.failed: str | None = None
        self.in_flight = 0
        self.unanswered: set[asyncio.Task[Any]] = set()

    @property
    def ready(self) -> bool:
        return self.started and not self.draining and self.failed is None

    def why_not_ready(self) -> str:
        if self.failed is not None:
            return "the server failed, as its log tells"
        return "draining" if self.draining else "starting: the first widths are being warmed"

    def check_serving(self) -> None:
        """Raises Unavailable while starting, after the grace period of a drain, and after a failure."""
        if self.refusing or self.failed is not None or not self.started:
            raise Unavailable(f"The server is not serving: {self.why_not_ready()}; try again.")

    def check_working(self) -> None:
        """Raises Unavailable after a failure. Who was let in before a drain's end is served, however long it takes."""
        if self.failed is not None:
            raise Unavailable(f"The server is not serving: {self.why_not_ready()}; try again.")

    def fail(self, why: str) -> None:
        self.failed = self.failed or why

    def dismiss_all(self) -> None:
        """Nobody waits any longer: the requests are cancelled, and the edge answers with ``farewell``."""
        for task in self.unanswered:
            task.cancel()

    def farewell(self) -> Unavailable:
        return Unavailable(
            f"The server had to leave before the request was answered: {self.why_not_ready()}; try again."
        )


class Server(uvicorn.Server):
    """uvicorn, leaving in the order above instead of closing its door first."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        keeper: Doorkeeper,
        *,
        grace_s: float,
        timeout_s: float,
        admin: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(config)
        self._lifecycle, self._grace_s, self._timeout_s = lifecycle, grace_s, timeout_s
        self._keeper, self._admin = keeper, admin
        self._leaving: asyncio.Task[None] | None = None
        self._putting_off, self._looking = (
            Tolerated("the watchdog", "put off"),
            Tolerated("connections", "looked after"),
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen for the API and, where it has an address of its own, for administration."""
        asyncio.get_running_loop().set_default_executor(started_pool(NUM_HELPERS, "help"))
        await super().startup(sockets)
        if self._admin is None:
            return
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            state, app_state = self.server_state, self.lifespan.state
            return config.http_protocol_class(config=config, server_state=state, app_state=app_state)  # type: ignore[call-arg]

        host, port = self._admin
        try:
            self.servers.append(await loop.create_server(protocol, host, port, ssl=config.ssl, backlog=config.backlog))
        except OSError as error:
            log.error("admin_address: %s", error)
            await self.lifespan.shutdown()
            raise SystemExit(1) from None
        log.info("administration at %s port %d", host, port)

    def hang_up(self, sig: int, frame: FrameType | None) -> None:
        """SIGHUP, of which a terminal that is closed sends more than one: none of them is a second signal."""
        if not self._lifecycle.draining:
            self.handle_exit(sig, frame)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived, in the main thread, between two steps of the event loop."""
        if self._lifecycle.draining:
            log.warning("second signal: leaving now")
            logging.shutdown()
            os._exit(128 + sig)
        self._lifecycle.draining = True
        log.info("%s: draining", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ``TICKS_A_SECOND`` times a second."""
        if counter % TICKS_A_SECOND == 0:
            with self._putting_off:
                faulthandler.dump_traceback_later(STANDSTILL_S, exit=True, file=STDERR)  # 85 us
            with self._looking:
                self._keeper.look(cast("set[Connection]", self.server_state.connections), time.monotonic())
        if self._lifecycle.failed is not None and not self.should_exit:
            await asyncio.sleep(FAREWELL_S)  # those who waited are being told
            self._lifecycle.dismiss_all()
            self.should_exit = True
        if self._lifecycle.draining and self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        return await super().on_tick(counter)

    async def _leave(self) -> None:
        now = asyncio.get_running_loop().time
        leave_by = now() + self._timeout_s - SHUTDOWN_S
        if self._lifecycle.started:
            await asyncio.sleep(min(self._grace_s, self._timeout_s - SHUTDOWN_S))
        self._lifecycle.refusing = True
        await self._refuse_the_last(min(now() + LAST_CALL_S, leave_by))
        while self._lifecycle.in_flight and now() < leave_by:
            await asyncio.sleep(0.02)
        self._lifecycle.dismiss_all()
        self.should_exit = True

    async def _refuse_the_last(self, until: float) -> None:
        """Who connected just before the grace ended hears so: closed before it is read, a request would be reset."""
        num_answered, before = self.server_state.total_requests, -1
        while num_answered != before and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(QUIET_S)
            num_answered, before = self.server_state.total_requests, num_answered


def run(settings: Settings) -> NoReturn:
    """Serve until told to leave, and end the process.

    Raises CheckpointError or SettingsError before anything is listening.
    """
    # Until uvicorn listens to signals, which takes a second of imports. The first process of a container would never
    # hear of one that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from server.app import build_app
    from server.connection import Connection, Doorkeeper, allow_open_files
    from server.heap import keep_little
    from server.log import configure, open_standard_files
    from server.tls import tls_options

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    open_standard_files()
    configure(settings.log_level, settings.log_format)
    https = tls_options(settings)
    keep_little()
    app, services = build_app(settings)
    allow_open_files(settings.max_connections)
    closed = services.metrics.connections_closed
    keeper = Doorkeeper(settings.max_connections, settings.client_timeout_s, lambda why: closed.labels(why).inc())
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(Connection, keeper)),
        ws="none",  # nothing here speaks it, and the library logs all headers at debug level, keys included
        host=settings.host,
        port=settings.port,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_config=None,
        timeout_keep_alive=75,  # longer than the clients' own 5 to 60 s, so that it is they who close first
        timeout_graceful_shutdown=1,
        **https,
    )
    grace_s, timeout_s = settings.drain_grace_s, settings.drain_timeout_s
    server = Server(config, services.lifecycle, keeper, grace_s=grace_s, timeout_s=timeout_s, admin=settings.admin)
    services.metrics.connections.set_function(lambda: len(server.server_state.connections))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else somebody wants it ignored, as nohup does
        signal.signal(signal.SIGHUP, server.hang_up)
    code = 0
    try:
        server.run()
    except SystemExit as error:  # it could not listen, and has said why
        code = error.code if isinstance(error.code, int) else 1
    if services.lifecycle.failed is not None:
        code = EX_SOFTWARE
    logging.shutdown()
    os._exit(code)  # an engine or a decoder that is still at work would keep the interpreter from ending
