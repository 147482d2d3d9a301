"""A real Prometheus watches a real server: every rule, alert and panel asks for something, gets it, and it is true.

Needs prometheus and promtool (``apt-get install prometheus``); takes half a minute.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.bench.client import Client, closed_loop
from tests.deploy.monitoring_files import RULES, Query, alerts, dashboard_queries, recording_rules, rules
from tests.service.service_process import Running, draw_photos, free_port, serving

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="no prometheus or promtool: apt-get install prometheus",
    ),
]
TARGET = {"namespace": "shop", "job": "scala-serve", "instance": "one"}  # as a PodMonitor names it
PATIENCE_S = 60.0
EMPTY = {  # what has no data here, and why
    "engine: GPU": "no GPU serves",
    "ScalaAbsent": "it asks for what is not there",
    "ScalaScalingBlind": "no kube-state-metrics here",
    "ScalaAtMaxReplicas": "no kube-state-metrics here",
}
CONSTANT = {
    "scala_ready",
    "scala_start_time_seconds",
    "scala_memory_limit_bytes",
    "scala_model_info",
    "scala_build_info",
}
CAUSED_BY_LOAD = {
    "ScalaAttainmentBurnFast",
    "ScalaAttainmentBurnSlow",
    "ScalaShedding",
    "ScalaAccuracyDebt",
    "ScalaSlowBatches",
    "ScalaCpuThrottled",
}
QUERIES = [
    *(Query(rule["record"], rule["expr"]) for rule in recording_rules()),
    *(Query(alert["alert"], re.sub(r" ([<>]|==) ", r" \1 bool ", alert["expr"])) for alert in alerts()),
    *dashboard_queries(),
]


class Prometheus(NamedTuple):
    http: httpx.Client

    def get(self, path: str, **query: str) -> Any:
        reply = self.http.get(f"/api/v1/{path}", params=query)
        body = reply.json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series; a scalar is one without labels."""
        data = self.get("query", query=expr)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def value(self, expr: str) -> float:
        ((_, value),) = self.query(expr)
        return value

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert time.monotonic() < deadline, "Prometheus did not get there in time"
            time.sleep(0.2)


@contextmanager
def watching(folder: Path, port: int) -> Iterator[Prometheus]:
    """A Prometheus with our rules that looks at this port once a second; killed at the end."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": TARGET["job"],
                "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": TARGET | {"pod": TARGET["instance"]}}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML, too
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as http:
            prometheus = Prometheus(http)
            prometheus.wait_until(lambda: _is_ready(http))
            yield prometheus
    finally:
        process.kill()
        process.wait()


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


async def load(port: int) -> None:
    """Narrow answers, wide ones, and more than can be answered in time; nine seconds."""
    client, photos = Client(port), draw_photos(20)
    try:
        for headers, concurrency in (
            ({"X-Width": "0.25", "X-Latency-Budget-Ms": "500"}, 2),
            ({"X-Latency-Budget-Ms": "500"}, 1),
            ({"X-Latency-Budget-Ms": "30"}, 128),
        ):
            await closed_loop(client, photos, headers, concurrency=concurrency, seconds=3)
    finally:
        client.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Running]]:
    """The load is over, Prometheus has seen all of it, and has evaluated the rules since."""
    folder = tmp_path_factory.mktemp("watched")
    with serving(folder / "log") as server, watching(folder, server.port) as prometheus:
        server.wait_ready()
        prometheus.wait_until(lambda: bool(prometheus.query("count_over_time((scala_ready == 1)[10s:1s]) > 2")))
        asyncio.run(load(server.port))
        answered = sum(value for _, value in counted(server, "scala_budget_total"))
        prometheus.wait_until(lambda: prometheus.value("sum(scala_budget_total)") == answered)
        settled = time.time()
        prometheus.wait_until(lambda: evaluated_since(prometheus, settled))
        yield prometheus, server


def evaluated_since(prometheus: Prometheus, instant: float) -> bool:
    ages = prometheus.query("min(prometheus_rule_group_last_evaluation_timestamp_seconds)")
    if ages:
        return ages[0][1] > instant + 1
    return prometheus.value("min(timestamp(job:scala_attainment:ratio_rate5m))") > instant + 1


def counted(server: Running, name: str = "") -> list[tuple[tuple[str, dict[str, str]], float]]:
    """What the server itself tells of this series, or of all that do not change while nobody asks."""
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return [
        ((sample.name, sample.labels), sample.value)
        for family in families
        if family.type in ("counter", "histogram") or family.name in CONSTANT
        for sample in family.samples
        if name in ("", sample.name)
    ]


@pytest.mark.parametrize("query", QUERIES, ids=[query.where for query in QUERIES])
def test_what_is_asked_for_has_data(watched: tuple[Prometheus, Running], query: Query) -> None:
    """An alert is asked for both sides of its conditions, or it would be silent with every name in it wrong."""
    answer = watched[0].query(query.expr)
    if query.where in EMPTY:
        assert answer == []
        return
    assert any(not math.isnan(value) for _, value in answer)
    anywhere = {"instance"} if "ALERTS" in query.expr else set()  # some alerts are about all replicas
    assert all(query.labels <= labels.keys() | anywhere for labels, _ in answer), answer


def test_what_prometheus_has_is_what_the_server_tells(watched: tuple[Prometheus, Running]) -> None:
    prometheus, server = watched
    compared = 0
    for (name, labels), value in counted(server):
        if labels.get("route") in ("/metrics", "/readyz"):  # they are asked for all the time
            continue
        matchers = ",".join(f'{key}="{value}"' for key, value in labels.items() if key != "le")
        found = [seen for seen in prometheus.query(f"{name}{{{matchers}}}") if _same_bucket(seen[0], labels)]
        assert [value for _, value in found] == [value], (name, labels)
        compared += 1
    assert compared > 100


def _same_bucket(seen: dict[str, str], labels: dict[str, str]) -> bool:
    return "le" not in labels or float(seen["le"]) == float(labels["le"])


def test_what_is_recorded_follows_from_the_servers_own_counters(watched: tuple[Prometheus, Running]) -> None:
    prometheus, server = watched
    by_outcome = {labels["outcome"]: value for (_, labels), value in counted(server, "scala_budget_total")}
    arrivals = sum(by_outcome[outcome] for outcome in ("met", "missed", "shed", "expired", "failed"))
    ((_, correct),) = counted(server, "scala_expected_correct_total")
    accuracies = [width["accuracy"] for width in server.http.get("/v1/model").json()["widths"]]
    best = max(accuracies)
    assert by_outcome["shed"] > 0
    for record, expected in {
        "job:scala_attainment:ratio_rate5m": by_outcome["met"] / arrivals,
        "job:scala_attainment:ratio_rate3d": by_outcome["met"] / arrivals,
        "job:scala_effective_accuracy:ratio_rate5m": correct / arrivals,
        "job:scala_accuracy_debt:points_rate5m": 100 * (best - correct / by_outcome["met"]),
        "job:scala_shed:ratio_rate5m": by_outcome["shed"] / arrivals,
        "job:scala_failed:ratio_rate5m": 0,
    }.items():
        assert prometheus.value(record) == pytest.approx(expected, rel=1e-3), record
    assert 0 < prometheus.value("job:scala_accuracy_debt:points_rate5m") < 100 * (best - min(accuracies))
    # A rate reaches a little beyond the first and the last scrape.
    assert 300 * prometheus.value("job:scala_arrivals:rate5m") == pytest.approx(arrivals, rel=0.2)
    assert (
        prometheus.value("job:scala_full_width_demand:sum") == prometheus.value("job:scala_full_width_demand:avg") > 0
    )


def test_every_rule_is_healthy_and_only_the_load_raises_alerts(watched: tuple[Prometheus, Running]) -> None:
    found = [rule for group in watched[0].get("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(rules())
    assert {(rule["health"], rule.get("lastError")) for rule in found} == {("ok", None)}
    active = {rule["name"] for rule in found if rule["type"] == "alerting" and rule["state"] != "inactive"}
    assert {"ScalaAttainmentBurnFast", "ScalaShedding"} <= active <= CAUSED_BY_LOAD


def test_a_server_that_is_gone_is_missed(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with watching(tmp_path, nobody.getsockname()[1]) as prometheus:
            prometheus.wait_until(
                lambda: (
                    {labels["alertname"] for labels, _ in prometheus.query("ALERTS")}
                    == {"ScalaTargetDown", "ScalaAbsent"}
                )
            )


def test_promtool_finds_nothing_wrong_with_our_metrics(watched: tuple[Prometheus, Running]) -> None:
    text = watched[1].http.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(recording_rules()) + len(alerts())} rules found" in done.stdout


@pytest.mark.parametrize("name", ["rules_test.yaml", "rules_slow_test.yaml"])
def test_alerts_fire_when_they_should_and_not_otherwise(name: str) -> None:
    command = ["promtool", "test", "rules", str(RULES.with_name(name))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
