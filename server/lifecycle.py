"""From start to exit: starting, ready, draining, refusing, gone.

SIGTERM, SIGINT or SIGHUP: not ready at once, new requests are still served for the grace period (the balancer needs
time to notice), then refused; the process leaves with 0 when none is in flight, or after the drain timeout. A second
SIGTERM or SIGINT leaves now. An engine that hangs or keeps failing leaves with 70 (``EX_SOFTWARE``), for the supervisor
to restart.

Native code that keeps the interpreter's lock stands still the event loop, and with it every watchdog written in Python.
The last one is C: after a minute without a turn of the event loop it writes where each thread is to standard error, and
leaves with 1, the only code it can. It also ends a process that was stopped for longer, when that goes on.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from server.errors import Unavailable
from server.threads import started_pool

if TYPE_CHECKING:
    from server.settings import Settings

EX_SOFTWARE = 70
STDERR = 2
NUM_HELPERS = 4  # threads for what takes long and is no decoding: plans, long answers
STANDSTILL_S = 60.0  # of the event loop
TICKS = 10  # of uvicorn, a second
FAREWELL_S = 0.5
SHUTDOWN_S = 1.3  # what uvicorn may take to close its connections
# How long a thread that wants the interpreter waits for a busy event loop: decoders and the engine ask a few times an
# image, and Python's 5 ms would each time be the most of a tight budget.
SWITCH_INTERVAL_S = 0.0002
log = logging.getLogger("scala.serve")


class Lifecycle:
    """The one place that knows whether the server takes requests; ``in_flight`` have a head but no answer yet."""

    def __init__(self) -> None:
        self.started = False
        self.draining = False
        self.refusing = False
        self.failed: str | None = None
        self.in_flight = 0

    @property
    def ready(self) -> bool:
        return self.started and not self.draining and self.failed is None

    def why_not_ready(self) -> str:
        if self.failed is not None:
            return f"the engine failed: {self.failed}"
        return "draining" if self.draining else "starting: the first widths are being warmed"

    def check_serving(self) -> None:
        """Raises Unavailable while starting, after the grace period of a drain, and after a failure."""
        if self.refusing or self.failed is not None or not self.started:
            raise Unavailable(f"The server is not serving: {self.why_not_ready()}.")

    def fail(self, why: str) -> None:
        self.failed = self.failed or why


class Server(uvicorn.Server):
    """uvicorn, leaving in the order above instead of closing its door first."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, *, grace_s: float, timeout_s: float) -> None:
        super().__init__(config)
        self._lifecycle, self._grace_s, self._timeout_s = lifecycle, grace_s, timeout_s
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_default_executor(started_pool(NUM_HELPERS, "help"))
        await super().startup(sockets)

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
        """uvicorn calls this ten times a second."""
        if counter % TICKS == 0:  # it takes 85 us
            faulthandler.dump_traceback_later(STANDSTILL_S, exit=True, file=STDERR)
        if self._lifecycle.failed is not None and not self.should_exit:
            await asyncio.sleep(FAREWELL_S)  # those who waited are being told
            self.should_exit = True
        if self._lifecycle.draining and self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        return await super().on_tick(counter)

    async def _leave(self) -> None:
        await asyncio.sleep(min(self._grace_s, self._timeout_s))
        self._lifecycle.refusing = True
        deadline = asyncio.get_running_loop().time() + max(0.0, self._timeout_s - self._grace_s - SHUTDOWN_S)
        while self._lifecycle.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.should_exit = True


def run(settings: Settings) -> NoReturn:
    """Serve until told to leave, and end the process.

    Raises CheckpointError or SettingsError before anything is listening.
    """
    from server.app import build_app
    from server.log import configure, open_standard_files
    from server.tls import tls_options

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    open_standard_files()
    configure(settings.log_level, settings.log_format)
    https = tls_options(settings)
    app, services = build_app(settings)
    config = uvicorn.Config(
        app,
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
    server = Server(config, services.lifecycle, grace_s=settings.drain_grace_s, timeout_s=settings.drain_timeout_s)
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
