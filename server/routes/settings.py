"""``GET /v1/settings``: what this server runs with."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from server.routes.documentation import SETTINGS
from server.schemas import EffectiveSettings
from server.services import Services

router = APIRouter()


@router.get("/v1/settings", **SETTINGS)
async def settings(request: Request) -> EffectiveSettings:
    """The effective settings: what was set and what follows from the machine or the package; secrets are masked."""
    services: Services = request.scope["state"]["services"]
    return services.settings
