"""Rules and dashboards, without any tool: complete, and about metrics and labels that the server has.

docs/api.md tells which those are, and ``tests/unit/edge/test_metrics.py`` that it is right.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.deploy.monitoring_files import (
    DASHBOARDS,
    ROOT,
    RULES,
    VARIABLES,
    Query,
    alerts,
    dashboard_queries,
    dashboards,
    filled_in,
    panels,
    recording_rules,
    rules,
)

TARGET_LABELS = {"namespace", "job", "instance"}  # that a scrape adds
UNITS = {"percentunit", "s", "bytes", "reqps", "none"}  # or one of our own, as "suffix: images"
GRID_COLUMNS = 24
SELECTOR = re.compile(r"\b((?:\w+:)?scala[_:][\w:]+|kube_\w+)(?:{(.*?)})?")
# What others tell. kube-state-metrics: docs/metrics/workload/horizontalpodautoscaler-metrics.md of its repository.
AUTOSCALER = {"namespace", "horizontalpodautoscaler"}
FOREIGN = {
    "kube_horizontalpodautoscaler_status_condition": AUTOSCALER | {"condition", "status"},
    "kube_horizontalpodautoscaler_status_current_replicas": AUTOSCALER,
    "kube_horizontalpodautoscaler_spec_max_replicas": AUTOSCALER,
}
QUERIES = [*(Query(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()), *dashboard_queries()]


def known_series() -> dict[str, set[str]]:
    """The labels of what can be asked for, by its name: what the server and others tell, and what rules record."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    known = FOREIGN | {rule["record"]: set(TARGET_LABELS) for rule in recording_rules()}
    for name, kind, labels in re.findall(r"^\| `(scala_\w+)` \| (\w+) \| (.*?) ?\| \S.* \|$", text, re.M):
        own = TARGET_LABELS | set(re.findall(r"`(\w+)`", labels))
        known |= (
            {name + end: own | {"le"} for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name: own}
        )
    return known


def test_there_are_three_dashboards_and_they_are_in_the_kustomization() -> None:
    made = yaml.safe_load((ROOT / "deploy" / "grafana" / "kustomization.yaml").read_text())["configMapGenerator"]
    assert [file for one in made for file in one["files"]] == ["overview.json", "engine.json", "slo.json"]
    assert {file.name for file in DASHBOARDS} == {"overview.json", "engine.json", "slo.json"}


@pytest.mark.parametrize("query", QUERIES, ids=[query.where for query in QUERIES])
def test_what_is_asked_for_exists(query: Query) -> None:
    known, found = known_series(), SELECTOR.findall(query.expr)
    assert found or query.expr.startswith(("vector(", "up{")) or "ALERTS{" in query.expr
    for name, matchers in found:
        assert name in known, name
        assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= known[name], (name, matchers)


@pytest.mark.parametrize(("where", "panel"), list(panels()), ids=[where for where, _ in panels()])
def test_a_panel_tells_what_it_shows_and_in_which_unit(where: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 10
    assert panel["description"].endswith(".")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS or unit.startswith("suffix:")
    assert panel["targets"]
    assert all(target["expr"].strip() for target in panel["targets"])
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert "$" not in filled_in("".join(target["expr"] for target in panel["targets"])), "a variable that nothing fills"


@pytest.mark.parametrize("name", dashboards())
def test_a_dashboard_belongs_to_no_one_grafana(name: str) -> None:
    board = dashboards()[name]
    assert board.keys().isdisjoint({"id", "version", "iteration", "gnetId", "__inputs"})
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert {f"${variable}" for variable in variables} - {"$datasource"} <= VARIABLES.keys()
    for one in (*board["panels"], *board["templating"]["list"][1:]):
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("name", dashboards())
def test_no_panel_covers_another(name: str) -> None:
    board = dashboards()[name]
    ids, places = zip(*((panel["id"], panel["gridPos"]) for panel in board["panels"]), strict=True)
    assert len(set(ids)) == len(ids)
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= GRID_COLUMNS for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


def test_dashboards_are_told_apart() -> None:
    for key in ("uid", "title"):
        assert len({board[key] for board in dashboards().values()}) == len(dashboards())


@pytest.mark.parametrize("alert", alerts(), ids=[alert["alert"] for alert in alerts()])
def test_an_alert_tells_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    notes = alert["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert "{{ $labels." in notes["summary"]
    assert re.search(r"{{ \$(value|labels)", notes["description"])
    assert notes["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"


@pytest.mark.parametrize("name", [alert["alert"] for alert in alerts()])
def test_an_alert_was_seen_to_fire_and_not_to(name: str) -> None:
    """That these cases hold is tried by promtool, in ``test_prometheus.py``."""
    files = (yaml.safe_load(RULES.with_name(file).read_text()) for file in ("rules_test.yaml", "rules_slow_test.yaml"))
    cases = [case for file in files for test in file["tests"] for case in test.get("alert_rule_test", ())]
    assert {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name} == {True, False}


def test_the_runbook_has_a_chapter_for_each_alert_and_no_other() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("\n## Runbook\n")[2]
    chapters = re.findall(r"^### (\w+)$", re.split(r"^## ", runbook, flags=re.M)[0], re.M)
    assert chapters == [alert["alert"] for alert in alerts()]


def test_kubernetes_gets_the_same_rules() -> None:
    """See the head of prometheusrule.yaml for how to bring it in line."""
    head, _, body = RULES.with_name("prometheusrule.yaml").read_text().partition("\nspec:\n")
    assert yaml.safe_load(head)["kind"] == "PrometheusRule"
    assert body == re.sub(r"^(?=.)", "  ", RULES.read_text(), flags=re.M)
