"""``GET /v1/quote``: what a budget would get now, by the questions that admission asks."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request

from server.errors import BadRequest, Impossible, Shed
from server.quote import width_foreseen
from server.routes.classify import read_budget_ms
from server.routes.documentation import QUOTE
from server.schemas import Quote
from server.services import Services
from server.types import Terms

router = APIRouter()


@router.get("/v1/quote", **QUOTE)
async def quote(request: Request) -> Quote:
    """The width, the expected accuracy and the chance of success that an image with this budget would get now."""
    services: Services = request.scope["state"]["services"]
    services.lifecycle.check_serving()
    budget_ms, arrival = read_query(request), time.monotonic()
    due, widths = arrival + budget_ms / 1000, services.admission.widths_for(None, None)
    try:
        services.admission.check_possible(widths, budget_ms / 1000)
        with services.admission.permit(None):
            services.admission.check_in_time(Terms(arrival, due, due, widths), undecoded_bytes=0)
    except Impossible as refusal:
        return _refused(budget_ms, 0.0, refusal.detail)
    except Shed as refusal:
        return _refused(budget_ms, _chance(services, budget_ms, False, arrival), refusal.detail)
    width = width_foreseen(
        due,
        widths,
        services.queue.view(),
        services.monitor.load(arrival),
        services.profile,
        services.policy,
        starts_at=max(services.device.free_by, arrival),
    )
    return Quote(
        budget_ms=budget_ms,
        admitted=True,
        width=float(width),
        expected_accuracy=services.measured_accuracy[width],
        chance=_chance(services, budget_ms, True, arrival),
        reason=None,
    )


def read_query(request: Request) -> float:
    """``budget_ms``. Raises BadRequest."""
    unknown = set(request.query_params) - {"budget_ms"}
    if unknown:
        raise BadRequest(f"Unknown query parameter {min(unknown)[:50]!r}; there is only budget_ms.")
    budget_ms = read_budget_ms(request.query_params, "budget_ms")
    if budget_ms is None:
        raise BadRequest("There is no budget_ms: name one, such as ?budget_ms=100.")
    return budget_ms


def _chance(services: Services, budget_ms: float, admitted: bool, now: float) -> float:
    services.quotes.given(budget_ms / 1000, admitted, now)
    return services.quotes.chance(admitted, services.monitor.promises, now)


def _refused(budget_ms: float, chance: float, reason: str) -> Quote:
    return Quote(budget_ms=budget_ms, admitted=False, width=None, expected_accuracy=None, chance=chance, reason=reason)
