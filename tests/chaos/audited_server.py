"""A server that writes down what it opens, connects to, starts and unpickles: ``python -m tests.chaos.audited_server``.

One line an event, to the file that ``AUDIT`` names, from before anything of the server is imported.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401  # a plan comes as a zip, whose reader would import it then
import os
import sys

WATCHED = (
    "open",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.symlink",
    "os.chmod",
    "os.listdir",
    "os.scandir",
    "socket.sendto",
    "exec",
    "compile",
    "import",
    "marshal.loads",
    "pickle.find_class",
    "ctypes.dlopen",
)


def watch(path: str) -> None:
    """To a descriptor that is open already: writing to it is no event."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def hook(event: str, given: tuple[object, ...]) -> None:
        if event in WATCHED:
            os.write(log, f"{event} {given!r}\n".encode(errors="backslashreplace"))

    sys.addaudithook(hook)


if __name__ == "__main__":
    watch(os.environ["AUDIT"])
    from server.cli import main

    main(["serve"])
