"""Pod Security Standards, level "restricted", in few lines: what the admission of a cluster would object to.

Source: kubernetes.io/docs/concepts/security/pod-security-standards, for Linux, as of Kubernetes 1.34: the controls of
"baseline" that concern pods without Windows and the alpha features, and all of "restricted". Volumes of type `image`
are not on that page: pod-security-admission, which decides, admits them since 1.33 (check_restrictedVolumes.go).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = frozenset(
    (
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    )
)
SECCOMP = ("RuntimeDefault", "Localhost")
SAFE_SYSCTLS = frozenset(
    (
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
    )
)
SELINUX_TYPES = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
Spec = dict[str, Any]


def objections(pod: Spec) -> Iterator[str]:
    """To a pod's specification, one sentence each."""
    yield from _to_pod(pod)
    for container in [*pod["containers"], *pod.get("initContainers", ()), *pod.get("ephemeralContainers", ())]:
        for objection in _to_container(container, pod.get("securityContext", {})):
            yield f"{container['name']}: {objection}"


def _to_pod(pod: Spec) -> Iterator[str]:
    context = pod.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is on"
    for volume in pod.get("volumes", ()):
        if kinds := volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is a {kinds.pop()}"
    for sysctl in context.get("sysctls", ()):
        if sysctl["name"] not in SAFE_SYSCTLS:
            yield f"sysctl {sysctl['name']} is not safe"
    yield from _to_context(context)


def _to_context(context: Spec) -> Iterator[str]:
    """What a pod and a container may say alike."""
    if context.get("runAsUser") == 0:
        yield "runs as user 0"
    if context.get("seccompProfile", {}).get("type", SECCOMP[0]) not in SECCOMP:
        yield "its seccomp profile is none"
    if context.get("appArmorProfile", {}).get("type") == "Unconfined":
        yield "AppArmor does not confine it"
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield "it chooses its SELinux context"


def _to_container(container: Spec, of_pod: Spec) -> Iterator[str]:
    own = container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    yield from _to_context(own)
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield "may run as root"
    if "seccompProfile" not in own and "seccompProfile" not in of_pod:
        yield "has no seccomp profile"
    if "ALL" not in capabilities.get("drop", ()):
        yield "keeps capabilities"
    if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "adds capabilities"
    if own.get("procMount", "Default") != "Default":
        yield "unmasks /proc"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "takes a port of the node"
    hooks = list(container.get("lifecycle", {}).values())
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
    if any(how.get("host") for one in hooks + probes for how in one.values() if isinstance(how, dict)):
        yield "is probed at another host"
