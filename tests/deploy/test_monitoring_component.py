"""What the monitoring component adds to the base. Needs kubectl."""

from __future__ import annotations

import json

import pytest

from tests.deploy.manifests import Object
from tests.deploy.monitoring_files import dashboards, rules


@pytest.fixture
def added(manifests: dict[str, list[Object]]) -> dict[tuple[str, str], Object]:
    """By kind and name; what another component has, too, is the base's."""
    found, without = (
        {(one["kind"], one["metadata"]["name"]): one for one in manifests[f"components/{name}"]}
        for name in ("monitoring", "namespace")
    )
    return {key: one for key, one in found.items() if key not in without}


def test_it_adds_what_the_operator_and_grafana_look_for(added: dict[tuple[str, str], Object]) -> None:
    names = {("ConfigMap", f"scala-serve-dashboard-{name}") for name in dashboards()}
    assert added.keys() == {("PodMonitor", "scala-serve"), ("PrometheusRule", "scala-serve"), *names}
    for one in added.values():
        assert one["metadata"]["namespace"] == "scala-serve"
        assert one["metadata"]["labels"]["app.kubernetes.io/name"] == "scala-serve"
    assert [
        rule for group in added["PrometheusRule", "scala-serve"]["spec"]["groups"] for rule in group["rules"]
    ] == rules()
    for name, board in dashboards().items():
        made = added["ConfigMap", f"scala-serve-dashboard-{name}"]
        assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(made["data"][f"{name}.json"]) == board


def test_pods_are_scraped_under_the_job_that_rules_and_dashboards_know(
    added: dict[tuple[str, str], Object],
) -> None:
    spec = added["PodMonitor", "scala-serve"]["spec"]
    assert spec["selector"] == {"matchLabels": {"app.kubernetes.io/name": "scala-serve"}}
    assert spec["jobLabel"] == "app.kubernetes.io/name"
    (endpoint,) = spec["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
