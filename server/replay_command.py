"""``scala-serve replay``: what a person can ask for; the work is in ``replay.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.flags import JsonFlag

if TYPE_CHECKING:
    from server.replay import Report, Tally
    from server.replay_log import DecisionReader, Moment
    from server.types import Decision


def replay(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A file, or the folder that --decision-log named.")],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Judge it on the same situations: adaptive, fixed:WIDTH, slackfit, threshold."
        ),
    ] = None,
    only_json: JsonFlag = False,
) -> None:
    """Derive recorded decisions again from their inputs: they must be the same, bit for bit.

    Prints a table and, as the last line, one JSON object.

        scala-serve serve --decision-log decisions
        scala-serve replay decisions
        scala-serve replay decisions --policy fixed:0.5

    Exit codes: 0 all the same; 1 a decision differs, and the first is named; 2 wrong usage or input.
    """
    from server.replay import replay as derive
    from server.replay_log import DecisionReader, log_files

    reader = DecisionReader(log_files(log))
    report = derive(reader, policy)
    if not report.decisions:
        raise ValueError(f"{log} holds no decision: nothing was asked of the server while it recorded")
    for path in reader.cut_off:
        print(f"scala-serve: {path} ends in the middle of a line, which is left out", file=sys.stderr)
    if report.first_difference is not None:
        print(f"scala-serve: {_difference(*report.first_difference)}", file=sys.stderr)
    if not only_json:
        _print_tables(report, reader)
    print(json.dumps(_as_json(report, reader)))
    if report.different:
        raise typer.Exit(1)


def _difference(moment: Moment, derived: Decision) -> str:
    return f"{moment.path}, line {moment.line} recorded {moment.decision}; derived again it is {derived}"


def _print_tables(report: Report, reader: DecisionReader) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("decisions", "identical", "different", "gaps", "dropped in gaps")
    figures = (report.decisions, report.identical, report.different, reader.gaps, reader.missing)
    table.add_row(*map(str, figures))
    Console().print(table)
    if report.tallies:
        judged = Table("", *report.tallies, title="the same situations")
        widths = sorted({width for tally in report.tallies.values() for width in tally.images})
        for width in widths:
            judged.add_row(
                f"run at width {width}", *(_share(tally, tally.images[width]) for tally in report.tallies.values())
            )
        judged.add_row("shed", *(_share(tally, tally.shed) for tally in report.tallies.values()))
        judged.add_row("in time, as predicted", *(f"{tally.in_time_share:.2%}" for tally in report.tallies.values()))
        judged.add_row("accuracy of those run", *(_percent(tally.mean_accuracy) for tally in report.tallies.values()))
        Console().print(judged)


def _share(tally: Tally, count: int) -> str:
    return f"{count} ({count / max(1, tally.images.total() + tally.shed):.1%})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _as_json(report: Report, reader: DecisionReader) -> dict[str, object]:
    figures: dict[str, object] = {
        "decisions": report.decisions,
        "identical": report.identical,
        "different": report.different,
        "gaps": reader.gaps,
        "dropped": reader.missing,
    }
    if report.tallies:
        figures["policies"] = {name: _tally_as_json(tally) for name, tally in report.tallies.items()}
    return figures


def _tally_as_json(tally: Tally) -> dict[str, object]:
    return {
        "widths": {str(width): count for width, count in sorted(tally.images.items())},
        "shed": tally.shed,
        "in_time_share": tally.in_time_share,
        "mean_accuracy": tally.mean_accuracy,
    }
