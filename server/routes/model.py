"""``GET /v1/model``: the card, with what this machine makes of each width."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from server.schemas import Latency, Model, ModelWidth
from server.services import Services

router = APIRouter()


@router.get("/v1/model")
async def model(request: Request) -> Model:
    """The checkpoint's card and the latency profile of its widths."""
    services: Services = request.scope["state"]["services"]
    card = services.checkpoint.card
    return Model(
        name=card["name"],
        image_size=services.checkpoint.config.image_size,
        classes=list(services.labels),
        widths=[_width(services, entry) for entry in card["widths"]],
        architecture=card["architecture"],
        preprocessing=card["preprocessing"],
        evaluation=card["evaluation"],
        training=card["training"],
        weights_sha256=card["weights_sha256"],
    )


def _width(services: Services, entry: dict[str, Any]) -> ModelWidth:
    width = services.checkpoint.config.width(entry["width"])
    cells = {b: services.profile.cell(width, b) for b in services.profile.warmed(width)}
    latency = {
        str(batch): Latency(p50=round(1000 * cell.p50_s, 3), p99=round(1000 * cell.p99_s, 3))
        for batch, cell in cells.items()
        if cell is not None
    }
    return ModelWidth(**entry, dominated=width in services.profile.dominated, latency_ms=latency)
