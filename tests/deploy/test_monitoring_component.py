"""What the monitoring component adds to any kustomization. Needs kubectl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.monitoring_files import ROOT, dashboards, rules

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
COMPONENT = ROOT / "deploy" / "kubernetes" / "components" / "monitoring"


@pytest.fixture
def objects(tmp_path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What an overlay of the component alone makes, by kind and name."""
    kustomization = {"namespace": "shop", "components": [os.path.relpath(COMPONENT, tmp_path.resolve())]}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization))
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}


def test_it_adds_what_the_operator_and_grafana_look_for(objects: dict[tuple[str, str], dict[str, Any]]) -> None:
    names = {("ConfigMap", f"scala-serve-dashboard-{name}") for name in dashboards()}
    assert objects.keys() == {("PodMonitor", "scala-serve"), ("PrometheusRule", "scala-serve"), *names}
    for one in objects.values():
        assert one["metadata"]["namespace"] == "shop"
        assert one["metadata"]["labels"]["app.kubernetes.io/name"] == "scala-serve"
    assert [
        rule for group in objects["PrometheusRule", "scala-serve"]["spec"]["groups"] for rule in group["rules"]
    ] == rules()
    for name, board in dashboards().items():
        made = objects["ConfigMap", f"scala-serve-dashboard-{name}"]
        assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(made["data"][f"{name}.json"]) == board


def test_pods_are_scraped_under_the_job_that_rules_and_dashboards_know(
    objects: dict[tuple[str, str], dict[str, Any]],
) -> None:
    spec = objects["PodMonitor", "scala-serve"]["spec"]
    assert spec["selector"] == {"matchLabels": {"app.kubernetes.io/name": "scala-serve"}}
    assert spec["jobLabel"] == "app.kubernetes.io/name"
    (endpoint,) = spec["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
