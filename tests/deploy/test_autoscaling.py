"""What the autoscalers ask for exists, means what they think, and is the same for both of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.scaling import DEMANDS
from server.metrics import OUTCOMES
from server.simulation.autoscaler import TOLERANCE, Step
from server.simulation.replicas import SIXTEEN
from server.simulation.scaling import GUARD, OUR_SIGNAL, TARGET
from tests.deploy.manifests import KUBERNETES, Object, named
from tests.unit.edge.application import Runner, Site

NAMESPACE = "scala-serve"
DEMAND, MISSED = "scala_full_width_demand_ratio", "scala_missed_budget_ratio"
LOOP = "scala_event_loop_busy_ratio"
NEITHER = {"impossible", "cancelled"}  # requests that no number of replicas could have answered in time
# Samples, 15 s apart, of two pods, one of which is scraped by two jobs, and of another namespace's.
SERIES = {
    f'{DEMAND}{{namespace="{NAMESPACE}",pod="a",job="1"}}': "0.9x20",
    f'{DEMAND}{{namespace="{NAMESPACE}",pod="a",job="2"}}': "0.9x20",
    f'{DEMAND}{{namespace="{NAMESPACE}",pod="b",job="1"}}': "0.3x20",
    f'{DEMAND}{{namespace="other",pod="c",job="1"}}': "5x20",
    f'{LOOP}{{namespace="{NAMESPACE}",pod="a",job="1"}}': "0.4x20",
    f'{LOOP}{{namespace="{NAMESPACE}",pod="a",job="2"}}': "0.4x20",
    f'{LOOP}{{namespace="{NAMESPACE}",pod="b",job="1"}}': "0.2x20",
    f'{LOOP}{{namespace="other",pod="c",job="1"}}': "5x20",
    # a: 3/s met, 1/s shed, and what does not count; b: 1 in 10 s expired, and nothing else.
    f'scala_budget_total{{namespace="{NAMESPACE}",pod="a",outcome="met"}}': "0+45x20",
    f'scala_budget_total{{namespace="{NAMESPACE}",pod="a",outcome="shed"}}': "0+15x20",
    f'scala_budget_total{{namespace="{NAMESPACE}",pod="a",outcome="impossible"}}': "0+60x20",
    f'scala_budget_total{{namespace="{NAMESPACE}",pod="b",outcome="met"}}': "0x20",
    f'scala_budget_total{{namespace="{NAMESPACE}",pod="b",outcome="expired"}}': "0+1.5x20",
    'scala_budget_total{namespace="other",pod="c",outcome="missed"}': "0+600x20",
}
OF_EACH = {DEMAND: {"a": 0.9, "b": 0.3}, MISSED: {"a": 0.25, "b": 0.1}, LOOP: {"a": 0.4, "b": 0.2}}


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    """prometheus-adapter's, by the name that the metric is given."""
    values = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())
    return {rule["name"]["as"]: rule for rule in values["rules"]["custom"]}


@pytest.fixture(scope="module")
def autoscaler(manifests: dict[str, list[Object]]) -> Object:
    return dict(named(manifests["overlays/cpu"], "HorizontalPodAutoscaler")["spec"])


@pytest.fixture(scope="module")
def scaled_object(manifests: dict[str, list[Object]]) -> Object:
    return dict(named(manifests["components/keda"], "ScaledObject")["spec"])


@pytest.fixture
def exported(application: Runner) -> set[str]:
    """The names of the series that a server exports."""
    lines: list[str] = []

    async def scrape(site: Site) -> None:
        lines.extend((await site.ask("GET", "/metrics")).body.decode().splitlines())

    application(scrape)
    return {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}


def expanded(rule: Any) -> str:
    """The query that the adapter makes of a rule for the pods a and b."""
    query: str = rule["metricsQuery"]
    matchers = f'namespace="{NAMESPACE}",pod=~"a|b"'
    series = rule["seriesQuery"].partition("{")[0]
    for name, text in {"Series": series, "LabelMatchers": matchers, "GroupBy": "pod"}.items():
        query = query.replace(f"<<.{name}>>", text)
    return query


def gives(query: str, samples: Mapping[str, float], scratch: Path, series: Mapping[str, str] = SERIES) -> bool:
    """Whether Prometheus' own evaluation of a query gives these samples, by their labels, and no others."""
    case = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "5m",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
            }
        ],
    }
    file = scratch / "case.yaml"
    file.write_text(yaml.safe_dump({"tests": [case]}))
    ran = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert ran.returncode == 0 or "got:" in ran.stdout + ran.stderr, ran.stderr
    return ran.returncode == 0


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: `apt-get install prometheus` to run this test"
)


def quantity(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


# -- the two say the same


def test_the_adapter_has_every_metric_that_the_autoscaler_asks_for(autoscaler: Object, rules: dict[str, Any]) -> None:
    asked = [metric["pods"]["metric"]["name"] for metric in autoscaler["metrics"]]
    assert asked == [DEMAND, MISSED, LOOP]
    assert rules.keys() == set(asked)
    for rule in rules.values():
        assert rule["resources"]["overrides"] == {label: {"resource": label} for label in ("namespace", "pod")}


def test_keda_scales_like_the_autoscaler(autoscaler: Object, scaled_object: Object) -> None:
    targets = [quantity(metric["pods"]["target"]["averageValue"]) for metric in autoscaler["metrics"]]
    assert [int(trigger["metadata"]["threshold"]) / 100 for trigger in scaled_object["triggers"]] == targets
    assert scaled_object["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == autoscaler["behavior"]
    limits = (autoscaler["minReplicas"], autoscaler["maxReplicas"])
    assert (scaled_object["minReplicaCount"], scaled_object["maxReplicaCount"]) == limits


def test_a_lost_signal_takes_no_replica_away(scaled_object: Object) -> None:
    assert scaled_object["minReplicaCount"] >= 1
    assert all(trigger["metadata"]["ignoreNullValues"] == "false" for trigger in scaled_object["triggers"])
    assert all(trigger["metricType"] == "AverageValue" for trigger in scaled_object["triggers"])
    assert scaled_object["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert scaled_object["fallback"]["replicas"] >= scaled_object["minReplicaCount"]


def test_replicas_at_rest_have_room_at_full_width(autoscaler: Object) -> None:
    """Even where the autoscaler's tolerance lets demand lie above the target."""
    target = quantity(autoscaler["metrics"][0]["pods"]["target"]["averageValue"])
    assert 0.7 <= target <= 0.8
    assert target * (1 + TOLERANCE) < 1


def test_both_ask_the_same_prometheus(scaled_object: Object) -> None:
    values = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())["prometheus"]
    address = f"{values['url']}:{values['port']}"
    assert [trigger["metadata"]["serverAddress"] for trigger in scaled_object["triggers"]] == [address] * 3


def test_what_is_simulated_is_what_is_deployed(autoscaler: Object) -> None:
    """But for how many replicas there may be, and for HTTP's share, which is not simulated."""
    assert [quantity(metric["pods"]["target"]["averageValue"]) for metric in autoscaler["metrics"][:2]] == [
        TARGET,
        GUARD,
    ]
    assert (OUR_SIGNAL.target, OUR_SIGNAL.guard) == (TARGET, GUARD)
    assert TARGET in DEMANDS  # what one replica loses at it is told by the benchmark
    up, down = (autoscaler["behavior"][way] for way in ("scaleUp", "scaleDown"))
    assert {way["selectPolicy"] for way in (up, down)} == {"Max"}
    assert set(SIXTEEN.up) == steps(up)
    assert set(SIXTEEN.down) == steps(down)
    windows = tuple(way["stabilizationWindowSeconds"] for way in (up, down))
    assert (SIXTEEN.up_window_s, SIXTEEN.down_window_s) == windows


def steps(way: Object) -> set[Step]:
    return {Step(one["value"], one["type"] == "Percent", one["periodSeconds"]) for one in way["policies"]}


# -- what they ask for exists


def test_what_they_ask_for_is_exported(exported: set[str], rules: dict[str, Any], scaled_object: Object) -> None:
    queries = [expanded(rules[metric]) for metric in (DEMAND, MISSED, LOOP)]
    queries += [trigger["metadata"]["query"] for trigger in scaled_object["triggers"]]
    asked = [set(re.findall(r"scala_\w+", query)) for query in queries]
    assert asked == [{DEMAND}, {"scala_budget_total"}, {LOOP}] * 2
    assert set().union(*asked) <= exported
    outcomes = [[set(found.split("|")) for found in re.findall(r'outcome=~"(.*?)"', query)] for query in queries]
    assert outcomes == [[], [set(OUTCOMES) - NEITHER - {"met", "failed"}, set(OUTCOMES) - NEITHER], []] * 2


def test_keda_asks_for_the_overlays_namespace(manifests: dict[str, list[Object]], scaled_object: Object) -> None:
    assert named(manifests["overlays/cpu"], "Deployment")["metadata"]["namespace"] == NAMESPACE
    for trigger in scaled_object["triggers"]:
        assert set(re.findall(r'namespace="(.*?)"', trigger["metadata"]["query"])) == {NAMESPACE}


# -- and means what they think


@needs_promtool
@pytest.mark.parametrize("metric", [DEMAND, MISSED, LOOP])
def test_the_adapter_gives_a_value_for_each_pod(rules: dict[str, Any], metric: str, tmp_path: Path) -> None:
    query, values = expanded(rules[metric]), {f'{{pod="{pod}"}}': value for pod, value in OF_EACH[metric].items()}
    assert gives(query, values, tmp_path)
    assert not gives(query, {'{pod="a"}': 0.5, '{pod="b"}': 0.1}, tmp_path)


@needs_promtool
@pytest.mark.parametrize(("trigger", "metric"), [(0, DEMAND), (1, MISSED), (2, LOOP)])
def test_keda_gets_one_series_which_is_their_sum(
    scaled_object: Object, trigger: int, metric: str, tmp_path: Path
) -> None:
    query = scaled_object["triggers"][trigger]["metadata"]["query"]
    assert gives(query, {"{}": 100 * sum(OF_EACH[metric].values())}, tmp_path)
    assert not gives(query, {"{}": 0.0}, tmp_path)


@needs_promtool
def test_keda_gets_nothing_where_nothing_is_scraped(scaled_object: Object, tmp_path: Path) -> None:
    elsewhere = {name: values for name, values in SERIES.items() if NAMESPACE not in name}
    for trigger in scaled_object["triggers"]:
        assert gives(trigger["metadata"]["query"], {}, tmp_path, elsewhere)
