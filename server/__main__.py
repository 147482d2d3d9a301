"""``python -m server`` is ``scala-serve``."""

from server.cli import main

main()
