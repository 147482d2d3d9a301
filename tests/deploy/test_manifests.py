"""The manifests are what Kubernetes takes, what its security standards allow, and what the server can live with."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.lifecycle import SHUTDOWN_S
from server.routes.classify import LATE_FACTOR
from server.serve_loop import LOAD_S
from server.settings import Settings
from tests.deploy.manifests import KUBERNETES, OVERLAYS, ROOT, Object, Workload, named, render, workloads
from tests.deploy.pod_security import objections
from tests.unit.edge.application import Runner, Site

# Those that kubernetes-validate knows; the oldest is the first that has a preStop `sleep` without a feature gate.
VERSIONS = ["1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37"]
SINCE = {"components/checkpoint": "1.31"}
# Defined by operators. Of KServe's runtime the container is checked, as a pod's.
CUSTOM = {"HTTPRoute", "InferenceService", "PodMonitor", "PrometheusRule", "ScaledObject", "ServingRuntime"}
MARGIN_S = 5  # of a pod's time to leave: for its last log lines and spans, and a slow node
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
Change = Callable[[Object], object]


def all_objects(manifests: dict[str, list[Object]], version: str = VERSIONS[-1]) -> list[Object]:
    """Each once, however many overlays it is in; without components that need a newer Kubernetes."""
    taken = [objects for name, objects in manifests.items() if SINCE.get(name, VERSIONS[0]) <= version]
    return [json.loads(text) for text in sorted({json.dumps(one) for some in taken for one in some})]


def all_workloads(manifests: dict[str, list[Object]]) -> list[Workload]:
    found = [workload for objects in manifests.values() for workload in workloads(objects)]
    assert {workload.kind for workload in found} == {"Deployment", "ServingRuntime"}
    return found


def as_pod(runtime: Object) -> Object:
    """The part of a ServingRuntime that is Kubernetes' own."""
    spec = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}


# -- Kubernetes takes them


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_knows_every_field(manifests: dict[str, list[Object]], version: str) -> None:
    for one in all_objects(manifests, version):
        if one["kind"] in CUSTOM:
            with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                kubernetes_validate.validate(one, version, strict=True)
        else:
            assert kubernetes_validate.validate(one, version, strict=True) == version
        if one["kind"] == "ServingRuntime":
            kubernetes_validate.validate(as_pod(one), version, strict=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(replica=1),
        lambda spec: spec.update(minReadySeconds="5"),
        lambda spec: spec.pop("selector"),
        lambda spec: spec["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"].update(second=1),
    ],
)
def test_a_mistake_is_found(manifests: dict[str, list[Object]], change: Change) -> None:
    deployment = copy.deepcopy(named(manifests["overlays/cpu"], "Deployment"))
    change(deployment["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_what_an_object_names_is_there(objects: list[Object]) -> None:
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    kinds = {kind for kind, _ in names}
    assert len(names) == len(objects)
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "Deployment":
            assert ("ServiceAccount", spec["template"]["spec"]["serviceAccountName"]) in names
        elif "scaleTargetRef" in spec and "InferenceService" not in kinds:  # which KServe makes a Deployment of
            assert ("Deployment", spec["scaleTargetRef"]["name"]) in names
        elif one["kind"] == "HTTPRoute":
            ports = [port["port"] for port in named(objects, "Service")["spec"]["ports"]]
            for backend in (backend for rule in spec["rules"] for backend in rule["backendRefs"]):
                assert ("Service", backend["name"]) in names
                assert backend["port"] in ports


def test_selectors_select_the_servers_pods(objects: list[Object]) -> None:
    (workload,) = workloads(objects)
    selectors: list[dict[str, str]] = []
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "Service":
            selectors.append(spec["selector"])
        elif one["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
            selectors.append(spec["selector"]["matchLabels"])
        elif one["kind"] == "NetworkPolicy":
            selectors.append(spec["podSelector"]["matchLabels"])
    selectors += [
        spread["labelSelector"]["matchLabels"] for spread in workload.pod.get("topologySpreadConstraints", ())
    ]
    assert all(selector and selector.items() <= workload.labels.items() for selector in selectors), selectors


def test_rules_for_others_name_others(manifests: dict[str, list[Object]]) -> None:
    """A label that kustomize adds to every selector would shut out clients, Prometheus and DNS."""
    spec = named(manifests["overlays/cpu"], "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
    peers += [peer for rule in spec["egress"] for peer in rule["to"]]
    clients, prometheus, dns = (peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer)
    assert clients == {"scala-serve-client": "true"}
    assert prometheus == {"app.kubernetes.io/name": "prometheus"}
    assert dns == {"k8s-app": "kube-dns"}


def test_replicas_have_one_owner(manifests: dict[str, list[Object]]) -> None:
    for name in OVERLAYS:
        objects = manifests[f"overlays/{name}"]
        owners = [one["kind"] for one in objects if one["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
        owners += ["Deployment" for one in objects if one["kind"] == "Deployment" and "replicas" in one["spec"]]
        assert len(owners) == 1, (name, owners)


def test_the_overlay_for_one_machine_needs_nothing_installed(manifests: dict[str, list[Object]]) -> None:
    objects = manifests["overlays/dev"]
    assert not {one["kind"] for one in objects} & (CUSTOM | {"HorizontalPodAutoscaler"})
    assert named(objects, "Deployment")["spec"]["replicas"] == 1


# -- security


def test_restricted_pods_only(objects: list[Object]) -> None:
    for workload in workloads(objects):
        assert not list(objections(workload.pod))
        assert workload.server["securityContext"]["readOnlyRootFilesystem"] is True
        assert workload.pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_namespace_admits_restricted_pods_only(manifests: dict[str, list[Object]], name: str) -> None:
    namespace = named(manifests[f"overlays/{name}"], "Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [one["metadata"]["namespace"] for one in manifests[f"overlays/{name}"] if one["kind"] != "Namespace"]
    assert set(others) == {namespace["name"]}


def of_container(**changes: Any) -> Change:
    return lambda pod: pod["containers"][0]["securityContext"].update(changes)


def of_pod(**changes: Any) -> Change:
    return lambda pod: pod["securityContext"].update(changes)


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
        (lambda pod: pod["volumes"].append({"name": "disk", "hostPath": {"path": "/"}}), "hostPath"),
        (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=8000), "port of the node"),
        (lambda pod: pod["containers"][0]["livenessProbe"]["httpGet"].update(host="10.0.0.1"), "another host"),
        (lambda pod: pod.update(initContainers=[{"name": "first"}]), "first: may gain privileges"),
        (of_pod(runAsNonRoot=False), "may run as root"),
        (of_pod(runAsUser=0), "user 0"),
        (of_pod(seccompProfile={"type": "Unconfined"}), "seccomp profile is none"),
        (of_pod(sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "sysctl kernel.msgmax"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "no seccomp profile"),
        (of_container(seLinuxOptions={"user": "system_u"}), "SELinux"),
        (of_container(appArmorProfile={"type": "Unconfined"}), "AppArmor"),
        (of_container(privileged=True), "privileged"),
        (of_container(allowPrivilegeEscalation=True), "may gain privileges"),
        (of_container(runAsNonRoot=False), "may run as root"),
        (of_container(capabilities={}), "keeps capabilities"),
        (of_container(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}), "adds capabilities"),
        (of_container(procMount="Unmasked"), "/proc"),
    ],
)
def test_a_pod_that_takes_more_is_objected_to(
    manifests: dict[str, list[Object]], change: Change, objection: str
) -> None:
    pod = copy.deepcopy(next(workloads(manifests["overlays/cpu"])).pod)
    change(pod)
    assert any(objection in one for one in objections(pod)), list(objections(pod))


def test_checkov_finds_only_what_has_a_reason(manifests: dict[str, list[Object]], tmp_path: Path) -> None:
    """Beside the manifests lies a pod that takes everything, to see that checkov looks at all."""
    checkov = shutil.which(os.environ.get("CHECKOV", "checkov"))
    if checkov is None:
        pytest.skip("no checkov here: `pipx install checkov`, or name its program in CHECKOV, to run this test")
    greedy = copy.deepcopy(named(manifests["overlays/dev"], "Deployment"))
    greedy["metadata"]["name"] = "greedy"
    greedy["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(all_objects(manifests)))
    (tmp_path / "greedy.yaml").write_text(yaml.safe_dump(greedy))
    ran = subprocess.run(
        [checkov, "--skip-download", "--framework", "kubernetes", "--output", "json", "--directory", tmp_path],
        capture_output=True,
        text=True,
    )
    report = json.loads(ran.stdout)
    failed = [(check["check_id"], Path(check["file_path"]).name) for check in report["results"]["failed_checks"]]
    excused = yaml.safe_load((KUBERNETES / "checkov.yaml").read_text())["skip-check"]
    assert report["summary"]["parsing_errors"] == 0
    assert {check for check, file in failed if file == "all.yaml"} == set(excused)
    assert ("CKV_K8S_16", "greedy.yaml") in failed


# -- the server can live with them


def test_settings_are_those_of_the_server(objects: list[Object]) -> None:
    for workload in workloads(objects):
        assert all(name.startswith("SCALA_") for name in workload.environment)
        settings = Settings.load({}, workload.environment)
        assert settings.host == "0.0.0.0"
        (port,) = workload.server["ports"]
        assert (port["name"], port["containerPort"]) == ("http", settings.port)
        writable = {mount["mountPath"] for mount in workload.server["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", str(settings.profile_dir)}


def test_a_pod_has_the_time_to_leave(objects: list[Object]) -> None:
    for workload in workloads(objects):
        settings = Settings.load({}, workload.environment)
        pre_stop_s = workload.server["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert workload.pod["terminationGracePeriodSeconds"] == pre_stop_s + settings.drain_timeout_s + MARGIN_S
        longest_s = LATE_FACTOR * settings.default_budget_ms / 1000  # of a request that names no budget
        assert settings.drain_timeout_s >= settings.drain_grace_s + longest_s + SHUTDOWN_S


def test_a_pod_has_the_time_to_start(objects: list[Object]) -> None:
    for workload in workloads(objects):
        probe = workload.server["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] > LOAD_S


def test_probes_are_answered_as_they_should(manifests: dict[str, list[Object]], application: Runner) -> None:
    probes = {
        (name, workload.server[name]["httpGet"]["path"])
        for workload in all_workloads(manifests)
        for name in PROBES
        if workload.server[name]["httpGet"]["port"] in ("http", workload.server["ports"][0]["containerPort"])
    }
    assert {name for name, _ in probes} == set(PROBES)

    async def warm(site: Site) -> None:
        for _, path in probes:
            assert (await site.ask("GET", path)).status == 200, path
        site.services.lifecycle.draining = True
        for name, path in probes:
            assert (await site.ask("GET", path)).status == (200 if name == "livenessProbe" else 503), path

    async def cold(site: Site) -> None:
        for name, path in probes:
            assert (await site.ask("GET", path)).status == (200 if name == "livenessProbe" else 503), path

    application(warm)
    application(cold, warm=False)


def test_cores_are_whole_and_its_own(objects: list[Object]) -> None:
    for workload in workloads(objects):
        requests, limits = (workload.server["resources"][key] for key in ("requests", "limits"))
        assert requests.items() <= limits.items()
        assert int(requests["cpu"]) >= 1
        assert limits.keys() - requests.keys() <= {"nvidia.com/gpu"}  # of which the limit is the request


def test_a_rollout_never_waits_for_a_gpu_that_is_taken(manifests: dict[str, list[Object]]) -> None:
    on_cpu, on_gpu = (named(manifests[f"overlays/{name}"], "Deployment")["spec"] for name in ("cpu", "gpu"))
    assert on_cpu["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert on_gpu["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert on_gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert toleration in on_gpu["template"]["spec"]["tolerations"]


def test_a_pod_with_a_gpu_never_serves_from_the_cpu(manifests: dict[str, list[Object]]) -> None:
    """The server ends where CUDA was asked for and is not there."""
    found = {name: Settings.load({}, next(workloads(manifests[f"overlays/{name}"])).environment) for name in OVERLAYS}
    assert {name: settings.device for name, settings in found.items()} == {
        name: "cuda" if name == "gpu" else "auto" for name in OVERLAYS
    }


def test_a_checkpoint_is_read_from_where_it_is_mounted(manifests: dict[str, list[Object]]) -> None:
    (workload,) = workloads(manifests["components/checkpoint"])
    (volume,) = (one for one in workload.pod["volumes"] if "image" in one)
    (mount,) = (one for one in workload.server["volumeMounts"] if one["name"] == volume["name"])
    assert mount["readOnly"] is True
    assert Settings.load({}, workload.environment).checkpoint == Path(mount["mountPath"])


def test_images_are_of_this_version(manifests: dict[str, list[Object]]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in OVERLAYS:
        (workload,) = workloads(manifests[f"overlays/{name}"])
        on_gpu = "nvidia.com/gpu" in workload.server["resources"]["limits"]
        assert workload.server["image"] == f"scala-serve:{version}{'-cuda' * on_gpu}"


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "dev"])
def test_naming_a_registry_leaves_the_tag(manifests: dict[str, list[Object]], name: str, tmp_path: Path) -> None:
    """As deploy/README.md says it: the CUDA image would be lost by naming a tag without it."""
    (images,) = re.findall(r"^```yaml\n(images:.*?)^```$", (KUBERNETES.parent / "README.md").read_text(), re.M | re.S)
    overlay = os.path.relpath(KUBERNETES / "overlays" / name, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{overlay}]\n{images}")
    (before,), (after,) = workloads(manifests[f"overlays/{name}"]), workloads(render(tmp_path))
    assert after.server["image"] == f"registry.example.com/{before.server['image']}"


# -- KServe and the gateway


def test_kserve_runs_the_same_container(manifests: dict[str, list[Object]]) -> None:
    (base,), (kserve,) = (list(workloads(manifests[f"overlays/{name}"])) for name in ("cpu", "kserve"))
    for part in ("image", "imagePullPolicy", "resources", "lifecycle", "volumeMounts"):
        assert kserve.server[part] == base.server[part], part
    assert kserve.pod["volumes"] == base.pod["volumes"]
    of_kserve = {"SCALA_PORT": "8080", "SCALA_MODEL_NAME": "tiny-imagenet"}
    assert kserve.environment == base.environment | of_kserve
    context = base.server["securityContext"] | base.pod["securityContext"]
    del context["fsGroup"]  # of a pod alone: whoever gives KServe's a claimed volume says it in the InferenceService
    assert kserve.server["securityContext"] == context
    assert all(kserve.server[probe] | {"httpGet": 0} == base.server[probe] | {"httpGet": 0} for probe in PROBES)


def test_kserve_finds_what_it_asks_for(manifests: dict[str, list[Object]]) -> None:
    objects = manifests["overlays/kserve"]
    (workload,) = workloads(objects)
    assert workload.server["name"] == "kserve-container"
    assert workload.server["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": 8080}
    service, runtime = named(objects, "InferenceService"), named(objects, "ServingRuntime")
    # Clients of KServe ask for the model by the service's name, whatever it is.
    assert Settings.load({}, workload.environment).model_name == service["metadata"]["name"]
    others = copy.deepcopy(objects)
    named(others, "InferenceService")["metadata"]["name"] = "pets"
    assert next(workloads(others)).environment["SCALA_MODEL_NAME"] == "pets"
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    formats = [one["name"] for one in runtime["spec"]["supportedModelFormats"]]
    assert service["spec"]["predictor"]["model"]["modelFormat"]["name"] in formats
    target = named(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"]
    assert target == f"{service['metadata']['name']}-predictor"


def test_kserve_is_scraped_and_guarded_like_the_others(manifests: dict[str, list[Object]]) -> None:
    """But for its gateway, which is another."""
    base, kserve = manifests["overlays/cpu"], copy.deepcopy(manifests["overlays/kserve"])
    gateway = named(kserve, "NetworkPolicy")["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"]
    assert gateway == {"kubernetes.io/metadata.name": "envoy-gateway-system"}
    gateway["kubernetes.io/metadata.name"] = "gateway-system"
    for kind in ("PodDisruptionBudget", "PodMonitor", "PrometheusRule", "NetworkPolicy"):
        assert named(kserve, kind)["spec"] == named(base, kind)["spec"], kind


def test_the_route_shows_what_is_for_everybody(manifests: dict[str, list[Object]], application: Runner) -> None:
    rules = named(manifests["components/gateway"], "HTTPRoute")["spec"]["rules"]
    matches = [match["path"] for rule in rules for match in rule["matches"]]

    def routed(path: str) -> bool:
        return any(
            path == match["value"] or (match["type"] == "PathPrefix" and path.startswith(match["value"] + "/"))
            for match in matches
        )

    async def ask(site: Site) -> None:
        paths = json.loads((await site.ask("GET", "/openapi.json")).body)["paths"]
        assert {path for path in paths if not routed(path)} == {"/livez", "/readyz", "/metrics", "/v1/settings"}
        assert (await site.ask("GET", "/")).status == 200  # which OpenAPI does not tell, no more than /docs and its own
        exact = {match["value"] for match in matches if match["type"] == "Exact"}
        assert exact - {"/", "/openapi.json"} <= paths.keys()

    application(ask)


def test_the_gateway_waits_longer_than_the_server(manifests: dict[str, list[Object]]) -> None:
    settings = Settings.load({}, next(workloads(manifests["overlays/cpu"])).environment)
    rules = named(manifests["components/gateway"], "HTTPRoute")["spec"]["rules"]
    limits_s = [float(rule["timeouts"]["request"].removesuffix("s")) or math.inf for rule in rules]
    assert min(limits_s) > LATE_FACTOR * settings.default_budget_ms / 1000
    endless = [rule["matches"] for rule, limit_s in zip(rules, limits_s, strict=True) if limit_s == math.inf]
    assert endless == [[{"path": {"type": "Exact", "value": "/v1/events"}}]]
