"""What the application tells about itself: metrics, the card, the documentation."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server.app import assemble
from server.metrics import Metrics
from server.settings import Settings
from tests.unit.edge.application import CLASSIFY, WIDE, QuietMachine, Runner, Site, form, statuses
from tests.unit.fake_engine import FakeEngine, usual_seconds
from tests.unit.toy import ACCURACIES, png
from tests.unit.virtual_time import Clock

METRICS = {
    "scala_requests_total",
    "scala_request_duration_seconds_count",
    "scala_stage_duration_seconds_count",
    "scala_budget_total",
    "scala_width_selected_total",
    "scala_batch_size_count",
    "scala_queue_depth",
    "scala_inflight_bytes",
    "scala_decoding_bytes",
    "scala_prediction_error_ratio",
    "scala_interference_ratio",
    "scala_expected_accuracy_ratio",
    "scala_accuracy_debt_points",
    "scala_engine_busy_ratio",
    "scala_event_loop_lag_seconds",
    "scala_cpu_load_ratio",
    "scala_cpu_throttled_ratio",
    "scala_memory_bytes",
    "scala_memory_limit_bytes",
    "scala_ready",
    "scala_start_time_seconds",
    "scala_expected_correct_total",
    "scala_gpu_memory_bytes",
    "scala_cancelled_before_dispatch_total",
    "scala_model_info",
    "scala_build_info",
    "scala_full_width_demand_ratio",
}

ACCURACY = {0.25: 0.4, 0.5: 0.5, 0.75: 0.6, 1.0: 0.7}


def test_every_metric_of_the_contract_is_there(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify()
        text = (await site.ask("GET", "/metrics")).body.decode()
        names = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines()}
        assert names >= METRICS
        for outcome in ("met", "missed", "shed", "impossible", "expired", "failed", "cancelled"):
            assert f'scala_budget_total{{outcome="{outcome}"}}' in text
        for stage in ("decode", "queue", "inference"):
            assert f'scala_stage_duration_seconds_count{{stage="{stage}"}} 1.0' in text
        assert 'scala_model_info{name="toy",sha256="' in text
        assert 'engine="fake"' in text

    site(scenario)


def test_requests_are_counted_by_route_status_width_and_outcome(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"X-Width": "0.5"})
        await site.classify(b"")
        for path in ("/a", "/b", "/v1/classify/x"):
            await site.ask("GET", path)
        await site.ask("GET", "/livez")
        assert await site.metric('scala_requests_total{route="/v1/classify",status="200"}') == 1
        assert await site.metric('scala_requests_total{route="/v1/classify",status="400"}') == 1
        assert await site.metric('scala_requests_total{route="none",status="404"}') == 3, "paths are no labels"
        assert await site.metric('scala_requests_total{route="/livez",status="200"}') == 1
        assert await site.metric('scala_request_duration_seconds_count{outcome="met",width="0.5"}') == 1
        assert await site.metric('scala_request_duration_seconds_sum{outcome="met",width="0.5"}') == pytest.approx(0.02)
        assert await site.metric('scala_budget_total{outcome="met"}') == 1
        assert await site.metric("scala_budget_total") == 1, "a malformed request has no budget"

    site(scenario)


def test_answers_in_their_budget_count_by_what_their_widths_are_worth(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert await site.metric("scala_expected_correct_total") == 0
        for width in ("0.25", "0.5"):
            await site.classify(headers={"X-Width": width})
        assert await site.metric("scala_expected_correct_total") == pytest.approx(0.4 + 0.5)
        body, headers = form(png(1), b"no image")
        await site.classify(body, headers | {"X-Width": "1"})
        assert await site.metric("scala_expected_correct_total") == pytest.approx(0.4 + 0.5 + 0.7), "a request is one"
        budget = {"X-Latency-Budget-Ms": "150", "X-Width": "1"}
        replies = await asyncio.gather(*(site.classify(headers=budget) for _ in range(50)))
        assert statuses(replies)[429] > 0
        met = await site.metric('scala_budget_total{outcome="met"}')
        assert await site.metric("scala_expected_correct_total") == pytest.approx(0.4 + 0.5 + 0.7 * (met - 2))

    site(scenario)


def test_a_scraper_sees_whether_the_server_is_ready_and_since_when_it_runs(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert await site.metric("scala_ready") == 0
        while not site.services.lifecycle.started:
            await asyncio.sleep(0.1)
        assert await site.metric("scala_ready") == 1
        site.services.lifecycle.draining = True
        assert await site.metric("scala_ready") == 0
        assert 0 <= time.time() - await site.metric("scala_start_time_seconds") < 60
        assert 0 < await site.metric("scala_memory_limit_bytes") <= psutil.virtual_memory().total

    site(scenario, warm=False)


def test_the_demand_at_full_width_counts_the_shed_and_not_the_impossible(site: Runner) -> None:
    async def demand(site: Site) -> float:
        return await site.metric("scala_full_width_demand_ratio")

    async def scenario(site: Site) -> None:
        budget = {"X-Latency-Budget-Ms": "150"}  # of half of it, 75 ms, two images at 30 ms each are the best batch
        assert await demand(site) == 0
        for impossible in (
            {"X-Latency-Budget-Ms": "9"},
            {"X-Width": "0.3"},
            {"X-Min-Accuracy": "0.9"},
            {"X-Width": "x"},
        ):
            await site.classify(headers=impossible)
        assert await demand(site) == 0
        replies = await asyncio.gather(*(site.classify(headers=budget) for _ in range(100)))
        assert statuses(replies)[429] > 50
        seconds = max(reply.seconds for reply in replies)
        assert await demand(site) == pytest.approx(100 / 15 * 0.030 * math.exp(-seconds / 15), rel=0.02)
        await asyncio.sleep(60)
        assert await demand(site) < 0.01

    site(scenario)


def test_a_pinned_width_demands_its_own_time(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"X-Width": "0.25", "X-Latency-Budget-Ms": "150"})
        assert await site.metric("scala_full_width_demand_ratio") == pytest.approx(0.25 / 15 * 0.030, rel=0.02)

    site(scenario)


def test_every_image_of_a_request_is_an_arrival(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(*[png(1)] * 4)
        await site.classify(body, headers | {"X-Latency-Budget-Ms": "150"})
        assert await site.metric("scala_full_width_demand_ratio") == pytest.approx(4 / 15 * 0.030, rel=0.02)

    site(scenario)


def test_the_accuracy_that_load_costs_is_told(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert await site.metric("scala_accuracy_debt_points") == 0
        given = [await site.classify(headers={"X-Latency-Budget-Ms": "25"}) for _ in range(100)]
        widths = [reply.json()["width"] for reply in given]
        assert set(widths) <= {0.25, 0.5}, "others take too long"
        expected = ACCURACY[widths[0]]
        for width in widths:
            expected += 0.05 * (ACCURACY[width] - expected)
        assert await site.metric("scala_expected_accuracy_ratio") == pytest.approx(expected)
        assert await site.metric("scala_accuracy_debt_points") == pytest.approx(100 * (0.7 - expected))

    site(scenario)


def test_the_model_card_with_what_this_machine_makes_of_it(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        card = (await site.ask("GET", "/v1/model")).json()
        assert (card["name"], card["image_size"], len(card["classes"]), card["classes"][3]) == (
            "toy",
            8,
            200,
            "class 3",
        )
        narrow, *_, wide = card["widths"]
        assert wide["latency_ms"] == {
            "1": {"p50": pytest.approx(40), "p99": pytest.approx(40)},
            "2": {"p50": pytest.approx(60), "p99": pytest.approx(60)},
            "4": {"p50": pytest.approx(100), "p99": pytest.approx(100)},
        }
        assert (narrow["accuracy"], narrow["dominated"]) == (0.4, False)
        assert narrow["accuracy_ci95"] == pytest.approx([0.39, 0.41])
        assert wide["macs"] > narrow["macs"] > 0

    site(scenario)


def test_the_api_is_documented(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        document = (await site.ask("GET", "/openapi.json")).json()
        classify = document["paths"][CLASSIFY]["post"]
        assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= classify["responses"].keys()
        named = {parameter["name"] for parameter in classify["parameters"]}
        assert {"top_k", "X-Latency-Budget-Ms", "X-Min-Accuracy", "X-Width", "X-Request-Id"} <= named
        assert (await site.ask("GET", "/docs")).status == 200

    site(scenario)


def test_a_policy_for_a_width_that_was_not_trained_is_refused_at_once(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="was not trained"):
        assemble(Settings(policy="fixed:0.3"), checkpoint, FakeEngine(Clock()), QuietMachine())


def test_the_toy_checkpoint_is_what_these_tests_believe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert [float(width) for width in checkpoint.config.widths] == list(ACCURACIES)
    assert usual_seconds(WIDE, [0]) == 0.04


def test_a_scraper_that_asks_for_openmetrics_gets_it_with_exemplars(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"X-Request-Id": "mine"})
        asked = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.2"}
        reply = await site.ask("GET", "/metrics", headers=asked)
        assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        buckets = [
            (sample.labels, sample.exemplar)
            for family in openmetrics(reply.body.decode())  # type: ignore[no-untyped-call]
            for sample in family.samples
            if sample.name == "scala_request_duration_seconds_bucket" and sample.exemplar
        ]
        ((labels, exemplar),) = buckets
        assert (labels["width"], labels["outcome"], exemplar.labels) == ("1", "met", {"request_id": "mine"})
        assert 0.03 < exemplar.value <= float(labels["le"])
        for accept in ({}, {"Accept": "text/plain"}, {"Accept": "*/*"}):
            plain = await site.ask("GET", "/metrics", headers=accept)
            assert plain.headers["content-type"].startswith("text/plain; version=")
            assert "request_id" not in plain.body.decode()

    site(scenario)


def test_each_request_leaves_a_line_where_that_is_switched_on(site: Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"X-Request-Id": "mine"})
        await site.classify(b"", headers={"X-Request-Id": "empty"})
        await site.ask("GET", "/livez")

    with caplog.at_level("INFO", "scala.access"):
        site(scenario)
        assert not caplog.records
        site(scenario, access_log="on")
    answered, empty = (vars(record) for record in caplog.records)
    assert (answered["method"], answered["path"], answered["status"]) == ("POST", CLASSIFY, 200)
    assert (answered["width"], answered["outcome"], answered["request_id"]) == ("1", "met", "mine")
    assert 40 <= answered["duration_ms"] < 41
    assert (empty["status"], empty["request_id"], "width" in empty, "outcome" in empty) == (400, "empty", False, False)


def test_a_failed_batch_is_logged_under_the_requests_it_failed(site: Runner, caplog: pytest.LogCaptureFixture) -> None:
    def fail(width: Width, images: list[int]) -> float:
        raise RuntimeError("kernel")

    async def scenario(site: Site) -> None:
        site.engine.seconds = fail
        assert (await site.classify(headers={"X-Request-Id": "mine"})).status == 500

        body, headers = form(png(1), b"no image", png(2))
        assert (await site.classify(body, headers | {"X-Request-Id": "several"})).status == 200

    site(scenario)
    ids = [vars(record).get("request_id") for record in caplog.records if record.name == "scala.http"]
    assert ids == ["mine", "several"], "one line for each request"


@pytest.mark.parametrize(("trace_id", "longest"), [("", 118), ("0" * 32, 78)])
def test_an_exemplar_has_no_more_than_openmetrics_allows(trace_id: str, longest: int) -> None:
    metrics = Metrics()
    for length in (1, longest, longest + 1, 128):
        labels = metrics.exemplar("x" * length, trace_id)
        assert sum(len(name) + len(value) for name, value in labels.items()) <= 128
        assert ("request_id" in labels) is (length <= longest)
        metrics.request_duration.labels("1", "met").observe(1.0, labels)


def test_no_request_can_spoil_a_scrape_by_its_name(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for name in ('a"} 1 # \\ {b=', 'a"', "a\\", "a # {b", "fine_1.2-3:{4}#,="):
            reply = await site.classify(headers={"X-Request-Id": name})
            assert reply.headers["x-request-id"] == name
            scraped = await site.ask("GET", "/metrics", headers={"Accept": "application/openmetrics-text"})
            families = [*openmetrics(scraped.body.decode())]  # type: ignore[no-untyped-call]
        exemplars = [sample.exemplar.labels for each in families for sample in each.samples if sample.exemplar]
        assert exemplars == [{"request_id": "fine_1.2-3:{4}#,="}]

    site(scenario)


def test_probabilities_that_are_no_numbers_are_a_failure_of_the_engine_and_not_an_answer(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.run = lambda pixels, width: np.full((len(pixels), 200), np.nan, np.float32)  # type: ignore[method-assign]
        assert (await site.classify()).json()["type"].endswith(":engine-failed")

    site(scenario)
