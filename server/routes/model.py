"""``GET /v1/model``: the card, with what this machine makes of each width."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from server.routes.documentation import MODEL
from server.schemas import Latency, Model, ModelWidth
from server.services import Services

router = APIRouter()


@router.get("/v1/model", **MODEL)
async def model(request: Request) -> Model:
    """The checkpoint's card and the latency profile of its widths."""
    services: Services = request.scope["state"]["services"]
    card = services.checkpoint.card
    return Model(
        name=services.settings.model_name,
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
    width, profile = services.checkpoint.config.width(entry["width"]), services.profile
    cells = {batch: profile.cell(width, batch) for batch in profile.warmed(width)}
    latency = {
        str(batch): Latency(p50=round(1000 * cell.p50_s, 3), p99=round(1000 * cell.p99_s, 3))
        for batch, cell in cells.items()
        if cell is not None
    }
    dominated_at = [batch for batch in cells if width in profile.dominated_at(batch)]
    dominated = bool(cells) and len(dominated_at) == len(cells)
    return ModelWidth(**entry, dominated=dominated, dominated_at=dominated_at, latency_ms=latency)
