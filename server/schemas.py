"""What the HTTP API answers, for OpenAPI and for readers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from server.settings import Settings

_Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]


class Images(BaseModel):
    """The JSON form of a request; ``routes/classify.py`` reads it."""

    model_config = ConfigDict(extra="forbid")

    images: list[_Base64] = Field(min_length=1, description="Encoded images, in base64")


class Prediction(BaseModel):
    class_id: int
    label: str
    score: float = Field(description="Probability, 0 to 1")


class Timing(BaseModel):
    """Milliseconds. ``total`` runs from the request's head to the making of this answer."""

    decode: float
    queue: float
    inference: float
    total: float


class Classification(BaseModel):
    model: str
    predictions: list[Prediction]
    width: float = Field(description="The trained width that answered")
    expected_accuracy: float | None = Field(description="Top-1 of that width, 0 to 1; null if never measured")
    budget_ms: float
    budget_met: bool
    timing_ms: Timing
    batch_size: int
    request_id: str


class Offer(BaseModel):
    """What a width can do on this machine when it is idle."""

    width: float
    accuracy: float = Field(description="Top-1, 0 to 1; the width itself if never measured")
    latency_ms: float = Field(description="The least budget that it can meet")


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str = Field(description="One sentence that names the value and the remedy")
    request_id: str
    widths: list[Offer] | None = Field(None, description="Of what is impossible: what is possible instead")


class ItemResult(BaseModel):
    """One image of several: its answer or its own error."""

    predictions: list[Prediction] | None = None
    width: float | None = None
    expected_accuracy: float | None = None
    batch_size: int | None = None
    timing_ms: Timing | None = None
    error: Problem | None = None


class Classifications(BaseModel):
    model: str
    results: list[ItemResult]
    budget_ms: float
    budget_met: bool
    request_id: str


class Quote(BaseModel):
    """What a request with this budget would get, were it here now."""

    budget_ms: float
    admitted: bool = Field(description="Whether it would be let in")
    width: float | None = Field(description="The width that it would meet if nobody else came; null if refused")
    expected_accuracy: float | None = Field(description="Top-1 of that width, 0 to 1; null if never measured")
    chance: float = Field(description="Chance of an answer in time, by what became of recent quotes and requests")
    reason: str | None = Field(description="Why it would be refused")


class Percentiles(BaseModel):
    """Milliseconds, from a request's head to its answer's last byte."""

    p50: float
    p99: float


class Tick(BaseModel):
    """What happened in ``seconds``, and how things stand after them; names and meanings as in `/metrics`."""

    at: float = Field(description="Unix time")
    seconds: float = Field(description="Since the tick before")
    state: str = Field(description="`ready`, or why the server is not")
    outcomes: dict[str, int] = Field(description="Requests since the tick before, by what became of their budget")
    widths: dict[str, int] = Field(description="Images run since the tick before, by width")
    arrival_rate: float = Field(description="Images/s, as the controller sees them")
    queue_depth: int = Field(description="Images decoded and waiting")
    engine_busy_ratio: float
    interference_ratio: float
    full_width_demand_ratio: float
    latency_ms: Percentiles | None = Field(description="Of the last ten seconds' answers; null without any")
    attainment: float | None = Field(description="Share of the last ten seconds' requests that was answered in time")
    expected_accuracy_ratio: float
    accuracy_debt_points: float


class Latency(BaseModel):
    """Milliseconds, on this machine when it is idle."""

    p50: float
    p99: float


class ModelWidth(BaseModel):
    width: float
    accuracy: float | None
    accuracy_ci95: tuple[float, float] | None
    parameters: int
    macs: int
    dominated: bool = Field(
        description="Dominated at every batch size on offer: chosen by a pin, a floor or a shorter p99"
    )
    dominated_at: list[int] = Field(
        description="Batch sizes at which another width is as accurate and no slower on this machine"
    )
    latency_ms: dict[str, Latency] = Field(description="By batch size; a size appears once it is warmed")


class Model(BaseModel):
    """The checkpoint's card; ``classes`` are the labels, by class id."""

    name: str
    image_size: int
    classes: list[str]
    widths: list[ModelWidth]
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    evaluation: dict[str, Any] | None
    training: dict[str, Any] | None
    weights_sha256: str


class EffectiveSettings(Settings):
    """What the server runs with: what was set, and what follows from the machine or the package. Secrets are masked."""

    engine: str  # type: ignore[assignment]
    """The engine and its version."""
    device: str  # type: ignore[assignment]
    """The model of the hardware that runs the network."""
    checkpoint: Path
    model_name: str
    num_threads: int
    max_batch: int
    profile_dir: Path
    tls_key_password: str | None = None  # type: ignore[assignment]
    """Stars, if there is one."""
