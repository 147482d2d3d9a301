"""What docs/operations.md tells to write or to type is what the manifests and the server take."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from server.settings import Settings
from tests.deploy.manifests import KUBERNETES, ROOT, Object, named, render, workloads

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def block_with(words: str) -> str:
    """The only YAML of the page that has these words in it."""
    (found,) = (text for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if words in text)
    return str(found)


def rendered(kustomization: str, folder: Path) -> list[Object]:
    """On the overlay for CPUs."""
    assert "resources: [../cpu]" in kustomization
    root = os.path.relpath(KUBERNETES, folder)
    kustomization = kustomization.replace("../../components", f"{root}/components")
    (folder / "kustomization.yaml").write_text(kustomization.replace("../cpu", f"{root}/overlays/cpu"))
    return render(folder)


@pytest.fixture(scope="module")
def canary(manifests: dict[str, list[Object]], tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """``manifests`` is there for its reason to skip: this is rendered anew."""
    return rendered(block_with("namespace: scala-serve-canary\nresources"), tmp_path_factory.mktemp("canary"))


def test_a_canary_is_a_whole_server_in_a_namespace_of_its_own(
    canary: list[Object], manifests: dict[str, list[Object]]
) -> None:
    namespaces = {one["metadata"].get("namespace", one["metadata"]["name"]) for one in canary}
    assert namespaces == {"scala-serve-canary"}
    shared = ("PrometheusRule", "ConfigMap")  # rules and dashboards would be there twice
    kinds = sorted(one["kind"] for one in manifests["overlays/cpu"] if one["kind"] not in shared)
    assert sorted(one["kind"] for one in canary) == sorted([*kinds, "ConfigMap"])
    (workload,) = workloads(canary)
    assert Settings.load({}, workload.environment).checkpoint == Path("/checkpoint")


def test_the_weights_are_for_the_service_that_there_is(canary: list[Object]) -> None:
    stable, new = yaml.safe_load(block_with("weight:"))["backendRefs"]
    service = named(canary, "Service")
    assert new["namespace"] == service["metadata"]["namespace"]
    assert {stable["name"], new["name"]} == {service["metadata"]["name"]}
    assert {stable["port"], new["port"]} == {port["port"] for port in service["spec"]["ports"]}
    assert stable["weight"] + new["weight"] == 100


def test_what_is_patched_to_see_it_scale_is_the_demand(manifests: dict[str, list[Object]]) -> None:
    (place,) = set(re.findall(r"/spec/metrics/(\d+)/pods/target/averageValue", PAGE))
    pods = named(manifests["overlays/cpu"], "HorizontalPodAutoscaler")["spec"]["metrics"][int(place)]["pods"]
    assert pods["metric"]["name"] == "scala_full_width_demand_ratio"
    assert "averageValue" in pods["target"]


@pytest.mark.usefixtures("manifests")
def test_a_light_network_gets_one_core_and_a_lower_target(tmp_path: Path) -> None:
    objects = rendered("resources: [../cpu]\n" + block_with("value: 260m"), tmp_path)
    resources = next(workloads(objects)).server["resources"]
    assert resources == {key: {"cpu": "1", "memory": "1Gi"} for key in ("requests", "limits")}
    metrics = named(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metrics[0]["pods"]["target"]["averageValue"] == "260m"


def test_files_that_are_named_in_commands_are_there() -> None:
    named_files = set(re.findall(r"deploy/kubernetes/[\w/-]+(?:\.yaml)?", PAGE))
    assert "deploy/kubernetes/components/hpa/prometheus-adapter.yaml" in named_files
    assert all((ROOT / name).exists() for name in named_files), named_files
