"""From the engine's probabilities to the answer's body and headers.

Writing takes of the budget like every other step: a large answer is written in a thread, in pieces of about a
millisecond, between which the event loop gets the interpreter, and only then is it judged whether the budget was met.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic_core import to_json

from server.routes.problem import problem
from server.services import Services
from server.types import Terms, Timed

T = TypeVar("T")
MAX_IN_PLACE_VALUES = 10_000  # of an answer that is written on the event loop, in about a millisecond


async def write_in_time(
    terms: Terms, answers: Sequence[Timed], write: Callable[[bool], T], num_values: int
) -> tuple[T, bool]:
    """What ``write`` makes of whether these answers meet the budget, and whether they do.

    ``num_values``: how many numbers and texts there are to write, which decides whether that is done in a thread.
    """
    if num_values <= MAX_IN_PLACE_VALUES:
        return _write_in_time(terms, answers, write)
    return await asyncio.to_thread(_write_in_time, terms, answers, write)


def _write_in_time(terms: Terms, answers: Sequence[Timed], write: Callable[[bool], T]) -> tuple[T, bool]:
    met = bool(answers) and time.monotonic() <= terms.order_by
    written = write(met)
    if met and terms.order_by < time.monotonic() <= terms.deadline:  # late by now, and the answer must say so
        return write(False), False
    return written, met  # after the deadline nobody waits for it


def classification(
    services: Services,
    terms: Terms,
    outcomes: Sequence[Timed | Exception],
    top_k: int,
    state: Mapping[str, Any],
    met: bool,
) -> bytes:
    """The body of the one-image answer."""
    (timed,) = outcomes
    assert isinstance(timed, Timed)
    return to_json({**_frame(services, terms, state, met), **_item(services, timed, top_k, terms)})


def classifications(
    services: Services,
    terms: Terms,
    outcomes: Sequence[Timed | Exception],
    top_k: int,
    state: Mapping[str, Any],
    met: bool,
) -> bytes:
    """The body of an answer to several images, each with its own predictions or its own error."""
    results = [
        to_json(
            _item(services, outcome, top_k, terms)
            if isinstance(outcome, Timed)
            else {"error": problem(outcome, state["request_id"])}
        )
        for outcome in outcomes
    ]
    return to_json(_frame(services, terms, state, met))[:-1] + b',"results":[' + b",".join(results) + b"]}"


def told_of_budget(terms: Terms, met: bool) -> dict[str, Any]:
    """What an answer's body says of the budget."""
    return {"budget_ms": _ms(terms.order_by - terms.arrival), "budget_met": met}


def settle(
    services: Services, terms: Terms, answers: Sequence[Timed], met: bool, state: MutableMapping[str, Any]
) -> dict[str, str]:
    """Note what became of a request whose images got these answers, which are written; the headers that tell it.

    ``Server-Timing`` has the longest that one of the images took of each stage: they go through them side by side.
    """
    services.answered(answers)
    widths = [str(width) for width in sorted({timed.answer.width for timed in answers})]
    outcome = "met" if met else "missed"
    state.update(outcome=outcome if answers else None, width=widths[0] if len(widths) == 1 else "")
    if len(answers) == len(state["jobs"]) == 1:
        state["ran_until"] = answers[0].answer.ran_until
    spent_ms = [_stages_ms(timed) for timed in answers]
    longest_ms = {stage: max(each[stage] for each in spent_ms) for stage in spent_ms[0]} if spent_ms else {}
    longest_ms["total"] = _ms(time.monotonic() - terms.arrival)
    return {
        "X-Scala-Width": ", ".join(widths),
        "X-Budget-Met": str(met).lower(),
        "Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in longest_ms.items()),
    }


def _frame(services: Services, terms: Terms, state: Mapping[str, Any], met: bool) -> dict[str, Any]:
    return {"model": services.settings.model_name, **told_of_budget(terms, met), "request_id": state["request_id"]}


def _item(services: Services, timed: Timed, top_k: int, terms: Terms) -> dict[str, Any]:
    answer = timed.answer
    best = np.argsort(-answer.probabilities, kind="stable")[:top_k]
    scores = answer.probabilities[best].tolist()
    if not math.isfinite(sum(scores)):
        raise ValueError(f"the engine answered {scores} at width {answer.width}")
    return {
        "predictions": [
            {"class_id": i, "label": services.labels[i], "score": round(score, 6)}
            for i, score in zip(best.tolist(), scores, strict=True)
        ],
        "width": float(answer.width),
        "expected_accuracy": services.measured_accuracy[answer.width],
        "batch_size": answer.batch_size,
        "timing_ms": {**_stages_ms(timed), "total": _ms(time.monotonic() - terms.arrival)},
    }


def _stages_ms(timed: Timed) -> dict[str, float]:
    answer = timed.answer
    return {"decode": _ms(timed.decode_s), "queue": _ms(answer.queue_s), "inference": _ms(answer.inference_s)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
