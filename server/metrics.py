"""The server's metrics in one registry of its own. Seconds, bytes and ratios."""

from __future__ import annotations

import re
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
MAX_ID_CHARS = 118  # of a request in an exemplar, whose names and values may have 128 together, by OpenMetrics, ...
TRACE_CHARS = 40  # ... of which a trace takes so many
_PLAIN_ID = re.compile(r"[!#-\[\]-~]+")  # what stands in an exemplar as it is: some parsers choke on an escaped quote
OUTCOMES = ("met", "missed", "shed", "impossible", "expired", "failed", "cancelled")


class Metrics:
    """Counters and histograms are written where things happen; gauges are read at scrape time (see ``app.py``)."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("scala_requests", "Requests answered", ["route", "status"], registry=registry)
        self.request_duration = Histogram(
            "scala_request_duration_seconds",
            "From a classification request's head to its answer's last byte",
            ["width", "outcome"],
            buckets=SECONDS,
            registry=registry,
        )
        self.stage_duration = Histogram(
            "scala_stage_duration_seconds",
            "Of one image, or of a refusal on arrival",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.budget = Counter(
            "scala_budget", "Classification requests by what became of their budget", ["outcome"], registry=registry
        )
        self.expected_correct = Counter(
            "scala_expected_correct",
            "Classification requests answered in their budget, each counted by the expected accuracy of its answer",
            registry=registry,
        )
        self.width_selected = Counter("scala_width_selected", "Images run at this width", ["width"], registry=registry)
        self.batch_size = Histogram(
            "scala_batch_size", "Images", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=registry
        )
        self.engine_seconds = Counter(
            "scala_engine_seconds",
            "Device time by what became of it; wasted: of images whose deadline passed or whose client left meanwhile; "
            "idle: although an image waited",
            ["use"],
            registry=registry,
        )
        self.prediction_ratio = Histogram(
            "scala_prediction_ratio",
            "A batch's time over its predicted median",
            buckets=(0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 4.0),
            registry=registry,
        )
        self.batches = Counter(
            "scala_batches",
            "Batches, by whether they took at most their predicted p99",
            ["within_p99"],
            registry=registry,
        )
        self.cancelled_before_dispatch = Counter(
            "scala_cancelled_before_dispatch", "Images whose client left before a batch took them", registry=registry
        )
        self.connections = Gauge("scala_connections", "Connections that are open", registry=registry)
        self.connections_closed = Counter(
            "scala_connections_closed",
            "Connections that the server closed, by why: malformed, slow, or full, for another one to be had",
            ["why"],
            registry=registry,
        )
        self.decision_log_dropped = Counter(
            "scala_decision_log_dropped", "Decisions that are missing from the decision log", registry=registry
        )
        self.model_info = Gauge(
            "scala_model_info", "The model's name and its weights", ["name", "sha256"], registry=registry
        )
        self.build_info = Gauge("scala_build_info", "The server", ["version", "engine"], registry=registry)
        # Finding what labels stand for takes 4 µs, at eight places on a request's way. They are few, and kept anyway.
        counters = self.requests, self.budget, self.width_selected, self.engine_seconds, self.batches
        for metric in (*counters, self.request_duration, self.stage_duration):
            metric.labels = cache(metric.labels)  # type: ignore[method-assign, assignment]
        for outcome in OUTCOMES:
            self.budget.labels(outcome)
        for why in ("malformed", "slow", "full"):
            self.connections_closed.labels(why)
        for use in ("answered", "wasted", "idle"):
            self.engine_seconds.labels(use)

    @staticmethod
    def exemplar(request_id: str, trace_id: str) -> dict[str, str]:
        """What leads from a histogram's bucket to one of its requests: the trace, if there is one, and the request."""
        labels = {"trace_id": trace_id} if trace_id else {}
        if len(request_id) <= MAX_ID_CHARS - (TRACE_CHARS if trace_id else 0) and _PLAIN_ID.fullmatch(request_id):
            labels["request_id"] = request_id
        return labels

    def gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"scala_{name}", text, registry=self.registry)
