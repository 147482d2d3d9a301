"""The protocol's JSON objects, for reading requests, for OpenAPI and for readers.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_RANK, MAX_TENSORS = 8, 8
MAX_TEXT = 256  # characters of what is not data: the id comes back, and names are repeated by errors
Dimension = Annotated[int, Field(ge=0, lt=2**31)]


class _Asked(BaseModel):
    """Nothing is converted; what the protocol does not know may be there and says nothing to us."""

    model_config = ConfigDict(strict=True, frozen=True)


class RequestInput(_Asked):
    name: str = Field(max_length=MAX_TEXT, json_schema_extra={"enum": ["image", "pixels"]})
    shape: list[Dimension] = Field(max_length=MAX_RANK, description="[N, 1] of `image`, [N, height, width, 3]")
    datatype: str = Field(
        max_length=MAX_TEXT,
        description="BYTES of `image`, UINT8 of `pixels`",
        json_schema_extra={"enum": ["BYTES", "UINT8"]},
    )
    parameters: dict[str, Any] | None = Field(
        None, description="`binary_data_size`: so many bytes after the JSON are the data"
    )
    data: list[Any] | None = Field(
        None, description="Flat or nested. Of `image`: strings, each an encoded image in base64. Of `pixels`: 0 to 255"
    )


class RequestOutput(_Asked):
    name: str = Field(max_length=MAX_TEXT, json_schema_extra={"enum": ["probabilities", "label", "width"]})
    parameters: dict[str, Any] | None = Field(
        None, description="`binary_data`: true or false; `classification`: how many classes, as strings, best first"
    )


class InferenceRequest(_Asked):
    id: str | None = Field(None, max_length=MAX_TEXT, description="Comes back in the answer")
    parameters: dict[str, Any] | None = Field(
        None,
        description="`latency_budget_ms`; `timeout` in microseconds: the smallest budget counts, the header's too; "
        "`priority`, 1 the highest; `binary_data_output`",
    )
    inputs: list[RequestInput] = Field(min_length=1, max_length=MAX_TENSORS)
    outputs: list[RequestOutput] | None = Field(
        None, max_length=MAX_TENSORS, description="All of them if there are none"
    )


class ResponseOutput(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | None = Field(None, description="Flat, row after row; absent where it is binary")


class InferenceResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] = Field(description="`budget_ms` and `budget_met`")
    outputs: list[ResponseOutput]


class Error(BaseModel):
    error: str


class Live(BaseModel):
    live: Literal[True]


class Ready(BaseModel):
    ready: Literal[True]


class ModelReady(BaseModel):
    name: str
    ready: Literal[True]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="-1 is any")


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class TensorConfig(BaseModel):
    name: str
    data_type: str
    dims: list[int] = Field(description="Without the batch's dimension")
    optional: bool = False


class ModelConfig(BaseModel):
    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(description="Images that one request may hold")
    input: list[TensorConfig]
    output: list[TensorConfig]
    dynamic_batching: dict[str, Any]


class Duration(BaseModel):
    count: int
    ns: int


class InferenceStatistics(BaseModel):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStatistics(BaseModel):
    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970; 0 before the first")
    inference_count: int = Field(description="Images")
    execution_count: int = Field(description="Batches")
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]


class Statistics(BaseModel):
    model_stats: list[ModelStatistics]


class IndexQuery(_Asked):
    ready: bool | None = Field(None, description="true: only models that are ready")


class IndexEntry(BaseModel):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str
