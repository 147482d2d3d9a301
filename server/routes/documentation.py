"""What OpenAPI says of the routes beyond what the framework reads off them: headers, errors, examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server import errors
from server.decode import MEDIA_TYPES
from server.routes.openapi import ID, NAME, answer, example, header, parameter, plain, ref, refused, shown
from server.routes.problem import problem
from server.schemas import Classification, Classifications, EffectiveSettings, Images, Percentiles, Tick

_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"  # a PNG, 1 x 1
_FRAME = {"model": NAME, "budget_ms": 100.0, "budget_met": True, "request_id": ID}
_ANSWER = {
    "predictions": [
        {"class_id": 145, "label": "school bus", "score": 0.644917},
        {"class_id": 166, "label": "trolleybus", "score": 0.247648},
    ],
    "width": 1.0,
    "expected_accuracy": 0.3136,
    "batch_size": 1,
    "timing_ms": {"decode": 0.845, "queue": 1.088, "inference": 1.304, "total": 4.293},
}
_QUOTE = {
    "budget_ms": 100.0,
    "admitted": True,
    "width": 1.0,
    "expected_accuracy": 0.3136,
    "chance": 0.99,
    "reason": None,
}
_MODEL = {
    "name": NAME,
    "image_size": 48,
    "classes": ["goldfish", "European fire salamander"],
    "widths": [
        {
            "width": 0.25,
            "accuracy": 0.2353,
            "accuracy_ci95": [0.2271, 0.2437],
            "parameters": 77576,
            "macs": 2938944,
            "dominated": False,
            "dominated_at": [],
            "latency_ms": {"1": {"p50": 0.239, "p99": 0.579}, "2": {"p50": 0.428, "p99": 0.674}},
        }
    ],
    "architecture": {"image_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 2},
    "preprocessing": {"image_size": 48, "crop_ratio": 1.0},
    "evaluation": {"dataset": "tiny-imagenet val", "images": 10000},
    "training": {"recipe": NAME},
    "weights_sha256": "673650c861246bbb0d5c3d7f5776b06468fee0305b5e99862dc78559639b6bd7",
}
_SETTINGS = EffectiveSettings(
    checkpoint=Path("checkpoints", NAME),
    model_name=NAME,
    engine="openvino 2026.4.1 bf16",
    device="AMD EPYC",
    num_threads=1,
    max_batch=16,
    profile_dir=Path("/var/cache/scala-serve"),
).model_dump(mode="json")
_TICK = Tick(
    at=1795414759.534,
    seconds=1.0,
    state="ready",
    outcomes={"met": 31, "missed": 0, "shed": 2, "impossible": 0, "expired": 0, "failed": 0, "cancelled": 0},
    widths={"0.25": 0, "0.5": 3, "0.75": 0, "1": 28},
    arrival_rate=33.1,
    queue_depth=1,
    engine_busy_ratio=0.12,
    interference_ratio=1.02,
    full_width_demand_ratio=0.09,
    latency_ms=Percentiles(p50=4.3, p99=9.1),
    attainment=0.94,
    expected_accuracy_ratio=0.31,
    accuracy_debt_points=0.36,
)
_OFFERS = {"widths": [{"width": 0.25, "accuracy": 0.2353, "latency_ms": 1.1}]}
BROKEN = errors.BrokenImage("The image is damaged or incomplete.")
UNSERVED = {  # how a request that was understood may end without an answer, on whichever route
    429: (
        "Refused for load, or the API key was used too often",
        errors.Shed("Even the narrowest width would be late; try again in 2 s.", retry_after_s=2),
    ),
    500: ("A bug; it is in the log", errors.EngineFailed("The engine failed on this batch.")),
    503: (
        "Starting, draining or failed",
        errors.Unavailable("The server is not serving: starting: the first widths are being warmed; try again."),
    ),
    504: ("The deadline came first", errors.Expired("The deadline passed after 100 ms.")),
}
_TIMING = "decode;dur=0.845, queue;dur=1.088, inference;dur=1.304, total;dur=4.293"
ANSWERED = {
    "X-Scala-Width": header("The width that answered; with commas if several did", "1"),
    "X-Budget-Met": header("Whether the answer was in time", "true", {"type": "string", "enum": ["true", "false"]}),
    "Server-Timing": header("Milliseconds of each stage; of several images the longest of each", _TIMING),
}
_BUDGET = {"type": "number", "exclusiveMinimum": 0, "maximum": 600_000}
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
TERMS = (  # headers of a request, on whichever route
    parameter("header", "X-Latency-Budget-Ms", _BUDGET, "Milliseconds this request may take", 100),
    parameter("header", "X-Min-Accuracy", _FRACTION, "Floor on the width's accuracy", 0.2),
    parameter("header", "X-Width", {"type": "number"}, "Pins a trained width", 1),
    parameter("header", "traceparent", {"type": "string"}, "W3C trace context", f"00-{ID}-00f067aa0ba902b7-01"),
)

LIVEZ: dict[str, Any] = {"responses": {200: plain("The event loop turns", "ok")}}
READYZ: dict[str, Any] = {
    "responses": {
        200: plain("The narrowest and the widest width are warmed", "ready"),
        503: plain("Starting, draining or failed", "starting: the first widths are being warmed"),
    }
}
METRICS: dict[str, Any] = {
    "responses": {200: plain("Prometheus text format", 'scala_budget_total{outcome="met"} 3781.0')}
}
SETTINGS: dict[str, Any] = {
    "responses": example("By the names that environment and file have for them", _SETTINGS),
}
MODEL: dict[str, Any] = {"responses": example("The card, with what this machine makes of each width", _MODEL)}

QUOTE: dict[str, Any] = {
    "responses": {
        **example("What such a request would get", _QUOTE),
        400: refused("No budget, or one that makes no sense", errors.BadRequest("There is no budget_ms.")),
        503: refused(*UNSERVED[503]),
    },
    "openapi_extra": {
        "parameters": [
            {"required": True} | parameter("query", "budget_ms", _BUDGET, "Milliseconds that a request may take", 100)
        ]
    },
}

# OpenAPI 3.2's word for one event, which the framework uses in 3.1, too.
EVENTS: dict[str, Any] = {
    "responses": {
        200: {
            "description": "One event a second; the stream ends when the server begins to drain",
            "content": {
                "text/event-stream": {
                    "itemSchema": {
                        "type": "object",
                        "required": ["data"],
                        "properties": {
                            "data": {
                                "type": "string",
                                "contentMediaType": "application/json",
                                "contentSchema": ref(Tick),
                            }
                        },
                    },
                    "example": f"data: {_TICK.model_dump_json()}\n\n",
                }
            },
        },
        503: refused(
            "Draining, or too many are listening",
            errors.Unavailable("32 clients listen to events already, the most there may be: close one first."),
        ),
    }
}

CLASSIFY: dict[str, Any] = {
    "responses": {
        200: answer(
            "One image, or `results` for several: each its answer or its error",
            ANSWERED,
            {
                "application/json": shown(
                    {"anyOf": [ref(Classification), ref(Classifications)]},
                    one={**_FRAME, **_ANSWER},
                    several={**_FRAME, "results": [_ANSWER, {"error": problem(BROKEN, ID)}]},
                )
            },
        ),
        400: refused(
            "Empty body, bad multipart, JSON, base64, query or header",
            errors.BadRequest("X-Latency-Budget-Ms is 'soon'; it must be a number of milliseconds such as 100."),
        ),
        413: refused(
            "More bytes, pixels or images than the limit",
            errors.TooLarge(
                "The image declares 90000 x 90000 = 8100000000 pixels; the limit is 50000000 (SCALA_MAX_PIXELS): "
                "send a smaller one."
            ),
        ),
        415: refused("Not an image type we read", errors.UnsupportedImage("The bytes are no image we recognise.")),
        422: refused(
            "A broken image, an untrained width, or a budget or floor that no width can satisfy here even when idle; "
            "`widths` lists what can",
            BROKEN,
            errors.Impossible("A budget of 0.1 ms cannot be met at any width.", extra=_OFFERS),
        ),
        **{status: refused(*told) for status, told in UNSERVED.items()},
    },
    "openapi_extra": {
        "parameters": [
            parameter("query", "top_k", {"type": "integer", "minimum": 1, "default": 5}, "Classes to return", 2),
            *TERMS,
        ],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(MEDIA_TYPES, _IMAGE),
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {"file": {"type": "array", "minItems": 1, "items": _IMAGE["schema"]}},
                    }
                },
                "application/json": {"schema": ref(Images), "example": {"images": [_DOT]}},
            },
        },
    },
}
