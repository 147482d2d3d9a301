"""The manifests as a cluster would get them: rendered by kustomize, every overlay, and every component on the base.

Components meet the base in a kustomization of the test's own, since some of them are in no overlay.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(folder.parent.name for folder in KUBERNETES.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(folder.parent.name for folder in KUBERNETES.glob("components/*/kustomization.yaml"))
OLDEST_KUBECTL = (1, 30)

Object = dict[str, Any]


def why_no_kubectl() -> str | None:
    """In words, or None where a kubectl with a kustomize that is new enough can be run."""
    try:
        told = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no kubectl here"
    version: str = json.loads(told.stdout)["clientVersion"]["gitVersion"]
    major, minor = re.findall(r"\d+", version)[:2]
    return None if (int(major), int(minor)) >= OLDEST_KUBECTL else f"kubectl is {version}; 1.30 or newer is needed"


def render(folder: Path) -> list[Object]:
    """What ``kubectl apply -k`` would send. Fails where kustomize does, or warns of what it will not know for long."""
    ran = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


def render_on_base(component: str, scratch: Path) -> list[Object]:
    """A component with nothing but the base."""
    scratch.mkdir()
    here = Path(os.path.relpath(KUBERNETES, scratch))
    kustomization = {
        "namespace": "scala-serve",
        "resources": [str(here / "base")],
        "components": [str(here / "components" / component)],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(scratch)


def named(objects: Iterable[Object], kind: str) -> Object:
    """The only object of a kind."""
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


@dataclass(frozen=True)
class Workload:
    """Something that pods are made of: their labels and their specification, and the ConfigMaps beside it by name."""

    kind: str
    labels: dict[str, str]
    pod: Object
    maps: dict[str, dict[str, str]]

    @property
    def server(self) -> Object:
        """Its only container."""
        (container,) = self.pod["containers"]
        assert not self.pod.get("initContainers")
        return dict(container)

    @property
    def environment(self) -> dict[str, str]:
        """What the server's process sees, as Kubernetes puts it together."""
        found: dict[str, str] = {}
        for source in self.server.get("envFrom", ()):
            found |= self.maps[source["configMapRef"]["name"]]
        return found | {one["name"]: one["value"] for one in self.server.get("env", ())}


def workloads(objects: list[Object]) -> Iterator[Workload]:
    """Deployments; and KServe's runtimes, with what their InferenceService says of the pod and is called."""
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "Deployment":
            yield Workload(one["kind"], spec["template"]["metadata"]["labels"], spec["template"]["spec"], maps)
        elif one["kind"] == "ServingRuntime":
            service = named(objects, "InferenceService")
            predictor = service["spec"]["predictor"]
            beside = ("automountServiceAccountToken", "enableServiceLinks", "terminationGracePeriodSeconds")
            containers = json.loads(json.dumps(spec["containers"]).replace("{{.Name}}", service["metadata"]["name"]))
            pod = {"containers": containers, "volumes": spec["volumes"]} | {key: predictor[key] for key in beside}
            yield Workload(one["kind"], spec["labels"], pod, maps)
