"""The contract's metrics, those of ``/metrics`` and those of docs/api.md are the same, with the same labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.edge.application import Runner, Site

DOCUMENT = Path(__file__).parents[3] / "docs" / "api.md"
CONTRACT = {  # by the names and labels that dashboards and alerts are built on
    "requests_total": {"route", "status"},
    "request_duration_seconds": {"width", "outcome"},
    "stage_duration_seconds": {"stage"},
    "budget_total": {"outcome"},
    "expected_correct_total": set(),
    "width_selected_total": {"width"},
    "batch_size": set(),
    "queue_depth": set(),
    "inflight_bytes": set(),
    "decoding_bytes": set(),
    "prediction_error_ratio": set(),
    "interference_ratio": set(),
    "expected_accuracy_ratio": set(),
    "accuracy_debt_points": set(),
    "engine_busy_ratio": set(),
    "event_loop_lag_seconds": set(),
    "event_loop_busy_ratio": set(),
    "cpu_load_ratio": set(),
    "cpu_throttled_ratio": set(),
    "memory_bytes": set(),
    "memory_limit_bytes": set(),
    "gpu_utilization_ratio": set(),
    "gpu_memory_bytes": set(),
    "cancelled_before_dispatch_total": set(),
    "ready": set(),
    "start_time_seconds": set(),
    "model_info": {"name", "sha256"},
    "build_info": {"version", "engine"},
    "full_width_demand_ratio": set(),
}
NEEDS_GPU = {"scala_gpu_utilization_ratio"}  # tests/unit/test_gpu.py
Described = dict[str, tuple[str, frozenset[str]]]  # type and labels by name


@pytest.fixture(scope="module")
def documented() -> Described:
    rows = re.findall(r"^\| `(scala_\w+)` \| (\w+) \| (.*?) ?\| \S.* \|$", DOCUMENT.read_text(encoding="utf-8"), re.M)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def described(metric: Metric) -> tuple[str, tuple[str, frozenset[str]]]:
    """As the document does: counters by the name of their sample, histograms without ``le``."""
    counter = metric.type == "counter"
    labels = {label for sample in metric.samples for label in sample.labels if not sample.name.endswith("_created")}
    return metric.name + "_total" * counter, (metric.type, frozenset(labels - {"le"}))


def test_the_document_has_every_metric_of_the_contract(documented: Described) -> None:
    for name, labels in CONTRACT.items():
        assert documented[f"scala_{name}"][1] == labels, name


def test_the_document_describes_what_is_scraped(site: Runner, documented: Described) -> None:
    found: Described = {}

    async def scenario(site: Site) -> None:
        await site.classify()
        text = (await site.ask("GET", "/metrics")).body.decode()
        families = [metric for metric in text_string_to_metric_families(text) if not metric.name.endswith("_created")]
        found.update(map(described, families))

    site(scenario)
    assert found == {name: row for name, row in documented.items() if name not in NEEDS_GPU}


def test_every_width_counts_from_zero(site: Runner) -> None:
    """A rate over the first image at a width needs a sample before it."""

    async def scenario(site: Site) -> None:
        text = (await site.ask("GET", "/metrics")).body.decode()
        for width in site.services.profile.widths:
            assert f'scala_width_selected_total{{width="{width}"}} 0.0' in text

    site(scenario)
