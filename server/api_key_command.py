"""``scala-serve api-key``: a new key, and the line with which a server knows it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def api_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is: letters, digits and . _ @ -")],
) -> None:
    """Make an API key: 32 random bytes, shown once.

    The key goes to standard error, the line for the server's file, with its hash alone, to standard output:

    scala-serve api-key alice >> keys.txt && scala-serve serve --api-keys-file keys.txt
    """
    from server.api_keys import line_for, new_key

    key = new_key()
    line = line_for(name, key)
    print(f"The key of {name}, shown this once: {key}", file=sys.stderr)
    print(line)
