"""Real load balancers on loopback, with plain settings: in turns, no retries, no health checks of their own.

They know nothing of their replicas but what they are told, as a Service knows its endpoints. ``ServiceLike`` passes
connections on (a Service's kube-proxy); ``Proxy`` and ``ReloadedProxy`` read HTTP and keep connections to the replicas
for the next request (a gateway, and an ingress that reloads its configuration).
"""

from __future__ import annotations

import getpass
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service.service_process import free_port

START_TIMEOUT_S = 20

HAPROXY = """
global
  stats socket {folder}/control level admin
defaults
  mode {mode}
  retries 0
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend entrance
  bind 127.0.0.1:{port}
  default_backend replicas
backend replicas
  balance roundrobin
  {reuse}
{servers}
"""

NGINX = """
user {user};
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream replicas {{
{servers}
    keepalive 16;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_next_upstream off;
    }}
  }}
}}
"""


class Balancer(ABC):
    """A process in front of replicas at ``ports``. ``program`` is what has to be installed."""

    program: str

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.folder, self.port = folder, free_port()
        self._replicas = ports
        self._configure(ports)

    @property
    @abstractmethod
    def command(self) -> Sequence[str]: ...

    @abstractmethod
    def route_to(self, ports: Collection[int]) -> None:
        """From now on new requests go to these replicas alone; those under way end where they are."""

    @abstractmethod
    def _configure(self, ports: Collection[int]) -> None: ...

    @contextmanager
    def running(self) -> Iterator[None]:
        with (self.folder / "balancer.log").open("wb") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log)
        try:
            self._wait()
            yield
        finally:
            self._process.terminate()
            self._process.wait()

    def _wait(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            assert self._process.poll() is None, (self.folder / "balancer.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise AssertionError(f"{self.program} did not start in {START_TIMEOUT_S} s")


class _HaProxy(Balancer):
    program, mode, reuse = "haproxy", "http", ""

    @property
    def command(self) -> Sequence[str]:
        return [found(self.program), "-db", "-f", str(self.folder / "config")]

    def route_to(self, ports: Collection[int]) -> None:
        for port in self._replicas:
            state = "ready" if port in ports else "maint"
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(self.folder / "control"))
                control.sendall(f"set server replicas/{port} state {state}\n".encode())
                assert control.recv(1000).strip() == b""

    def _configure(self, ports: Collection[int]) -> None:
        servers = "\n".join(f"  server {port} 127.0.0.1:{port}" for port in ports)
        values = {"folder": self.folder, "port": self.port, "mode": self.mode, "reuse": self.reuse}
        (self.folder / "config").write_text(HAPROXY.format(servers=servers, **values))


class ServiceLike(_HaProxy):
    """Passes connections on, and leaves those that there are where they go."""

    mode = "tcp"


class Proxy(_HaProxy):
    """Any request may go out on a connection that another has used."""

    reuse = "http-reuse always"


class ReloadedProxy(Balancer):
    program = "nginx"

    @property
    def command(self) -> Sequence[str]:
        return [found(self.program), "-e", str(self.folder / "error.log"), "-c", str(self.folder / "config")]

    def route_to(self, ports: Collection[int]) -> None:
        self._configure(ports)
        self._process.send_signal(signal.SIGHUP)

    def _configure(self, ports: Collection[int]) -> None:
        servers = "\n".join(f"    server 127.0.0.1:{port} max_fails=0;" for port in ports)
        values = {"folder": self.folder, "port": self.port, "user": getpass.getuser()}
        (self.folder / "config").write_text(NGINX.format(servers=servers, **values))


def found(program: str) -> str:
    """Where it is; Debian keeps such programs out of people's PATH. Skips the test where it is not installed."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed: apt-get install {program} to run this test")
    return path
