"""``scala-serve classify``: ask a server about files, and show what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.flags import JsonFlag

if TYPE_CHECKING:
    import httpx

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)  # of the files that are taken from a folder; a file that is named is sent whatever it is called
PATIENCE_S = 60.0  # beyond the budget: a server answers or refuses long before


def classify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Images, and folders of images, whatever they nest.")
    ],
    url: Annotated[str, typer.Option(metavar="URL", help="The server.")] = "http://127.0.0.1:8000",
    budget_ms: Annotated[
        float | None, typer.Option(metavar="MS", min=0.001, max=600_000, help="What each image may take.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(metavar="A", min=0, max=1, help="Least accuracy of the width, such as 0.3.")
    ] = None,
    width: Annotated[float | None, typer.Option(metavar="W", min=0, max=1, help="Pin a trained width.")] = None,
    top_k: Annotated[int, typer.Option(metavar="N", min=1, help="Classes to show of each image.")] = 1,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="SCALA_API_KEY", help="For a server that asks for one; others can read flags."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Requests at a time.")] = 4,
    only_json: JsonFlag = False,
) -> None:
    """Ask a running server what is on images.

    Shows a table with a row for each image, and for each that got no answer why. Of folders, all images are taken.

        scala-serve classify cat.jpg dog.png
        scala-serve classify photos --budget-ms 100 --top-k 3
        scala-serve classify photos --min-accuracy 0.3 --json > answers.json
        scala-serve classify cat.jpg --url https://vision.example.com --width 0.5

    Exit codes: 0 all were answered; 1 some were not; 2 wrong usage.
    """
    import httpx

    from server.console import progress

    images = list(_images(files))
    wishes = {"X-Latency-Budget-Ms": budget_ms, "X-Min-Accuracy": min_accuracy, "X-Width": width}
    headers = {name: f"{wish:g}" for name, wish in wishes.items() if wish is not None}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {_header(api_key)}"
    patience_s = PATIENCE_S + (budget_ms or 0) / 1000
    with (
        httpx.Client(base_url=_base(url), headers=headers, timeout=patience_s) as client,
        ThreadPoolExecutor(concurrency) as pool,
        progress(True) as bar,
    ):
        asked = pool.map(lambda image: _ask(client, image, top_k), images)
        outcomes = list(bar.track(asked, total=len(images), description="classifying"))
    failed = sum(outcome.error is not None for outcome in outcomes)
    if only_json:
        results = [outcome.as_json() for outcome in outcomes]
        print(json.dumps({"answered": len(outcomes) - failed, "failed": failed, "results": results}))
    else:
        _print_table(outcomes)
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file: the server's ``answer``, or the ``error``, with at least a ``detail``."""

    file: Path
    answer: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        file = {"file": str(self.file)}
        return {**file, **self.answer} if self.answer is not None else {**file, "error": self.error}


def _images(named: Sequence[Path]) -> Iterator[Path]:
    """Files as they are named, and of each folder its images, sorted. Raises ValueError for a folder without any."""
    for path in named:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise ValueError(f"{path} holds no image: there is no file in it whose name ends in .jpg, .png or the like")
        yield from found


def _base(url: str) -> str:
    """Raises ValueError for what is no HTTP address."""
    import httpx

    try:
        parts = httpx.URL(url)
        good = parts.scheme in ("http", "https") and parts.host and not parts.query and not parts.fragment
    except httpx.InvalidURL:
        good = False
    if not good:
        raise ValueError(f"--url is {url!r}; it must look like http://127.0.0.1:8000")
    return url


def _header(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise ValueError("--api-key holds a character that no key has; give the key alone, without a line's end")
    return value


def _ask(client: httpx.Client, file: Path, top_k: int) -> Outcome:
    """One request. What goes wrong with a file stays with it."""
    import httpx

    try:
        with file.open("rb") as content:
            reply = client.post("v1/classify", params={"top_k": top_k}, content=content)
    except OSError as error:
        return Outcome(file, error={"detail": f"cannot be read: {error.strerror or error}"})
    except httpx.HTTPError as error:
        return Outcome(file, error={"detail": f"{client.base_url} gives no answer: {error or type(error).__name__}"})
    try:
        found = reply.json()
        if reply.status_code == 200 and "predictions" in found:
            return Outcome(file, answer=found)
        return Outcome(file, error={"status": reply.status_code, "detail": found["detail"]})
    except (KeyError, TypeError, ValueError):  # a proxy's page, perhaps
        return Outcome(file, error={"status": reply.status_code, "detail": "what answers is no scala-serve"})


def _print_table(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from server.log import printable

    table = Table(Column("file", overflow="fold"), "class", "score", "width", "accuracy", "ms", "in time")
    for outcome in outcomes:
        cells = _cells(outcome.answer) if outcome.answer is not None else [[_why(outcome.error or {})]]
        # As plain text: labels are the server's and names anybody's, and neither may be taken for markup.
        table.add_row(*(Text("\n".join(map(printable, lines))) for lines in ([str(outcome.file)], *cells)))
    Console().print(table)


def _cells(answer: Mapping[str, Any]) -> Iterator[list[str]]:
    """The lines of each cell: a line for each class."""
    yield [str(one["label"]) for one in answer["predictions"]]
    yield [f"{one['score']:.3f}" for one in answer["predictions"]]
    yield [f"{answer['width']:g}"]
    yield ["–" if answer["expected_accuracy"] is None else f"{answer['expected_accuracy']:.3f}"]
    yield [f"{answer['timing_ms']['total']:.1f}"]
    yield ["yes" if answer["budget_met"] else "no"]


def _why(error: Mapping[str, Any]) -> str:
    status = f"{error['status']}: " if "status" in error else ""
    return status + str(error["detail"])
