"""The deployment files in configs/: valid for the real parsers, and consistent with the code.

`make test-all` also checks them with promtool and systemd-analyze.
"""

from __future__ import annotations

import configparser
import io
import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from prometheus_client import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from proxy.admin.aggregate import AllProcesses
from proxy.admin.delays import Histogram
from proxy.admin.metrics import ProxyCollector
from proxy.admin.port import PAGES
from proxy.admin.self_probe import HUNG_AFTER
from proxy.admin.snapshot import CoverState, Snapshot
from proxy.config.file import merge_settings
from proxy.config.knobs import Settings, knobs
from proxy.config.values import parse_size_bytes
from tests.proxy.config.test_packaging import VERSION
from upstream.pool import EndpointState

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
KUBERNETES = sorted((CONFIGS / "kubernetes").glob("*.yaml"))
KUBERNETES_VERSIONS = ("1.29", "1.33")
PROBED = {"/livez", "/readyz", "/health"}


class FakeMonitor:
    """A monitor with what the collector needs: a proxy that has just started."""

    delivery_delay = Histogram()
    loop_delay = Histogram()
    whole = AllProcesses()

    def take(self) -> Snapshot:
        return Snapshot(
            covers=[CoverState(cover="/s/")],
            certificate_expiry_s={"listener": 0},
            joins_total={"live": 0},
            grpc_started_total={"/etcdserverpb.KV/Range": 1},
            grpc_handled_total={"/etcdserverpb.KV/Range OK": 1},
            refusals_total={"x": 0},
            evictions_total={"x": 0},
        )

    def limits(self) -> dict[str, float]:
        return {"x": 0}

    def endpoints(self) -> list[EndpointState]:
        return [EndpointState("x", True, "")]


@cache
def exported() -> frozenset[str]:
    """Return every metric name in a scrape of the proxy."""
    process = ProcessCollector(registry=CollectorRegistry())
    families = [*ProxyCollector(FakeMonitor()).collect(), *process.collect()]  # type: ignore[arg-type]  # a fake
    # A labelled metric has no samples at first, but its family has a name.
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    gauges = {family.name for family in families if family.type == "gauge"}
    return frozenset((counters | gauges).union(sample.name for family in families for sample in family.samples))


def check_expression(expression: str) -> None:
    """Check that the expression is PromQL and uses only exported metrics."""
    plain = expression.replace("$__rate_interval", "1m").replace("$job", "x").replace("$instance", "x")
    promql_parser.parse(plain)
    names = set(re.findall(r"\b((?:watchmux|process|etcd_grpc_proxy|grpc_server)_[a-z_]+)\b", plain))
    assert names - exported() == set()


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods(path: Path) -> list[dict[str, Any]]:
    """The pod specs in a file."""
    found = []
    for document in documents(path):
        if document["kind"] == "Pod":
            found.append(document["spec"])
        elif document["kind"] in ("Deployment", "StatefulSet"):
            found.append(document["spec"]["template"]["spec"])
    return found


def ours(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod, container) of every watchmux in a file."""
    return [
        (pod, container)
        for pod in pods(path)
        for container in [*pod.get("initContainers", []), *pod["containers"]]
        if container["name"] == "watchmux"
    ]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_takes(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_deployment_has_all_it_takes() -> None:
    kinds = {document["kind"] for document in documents(CONFIGS / "kubernetes/deployment.yaml")}
    assert kinds == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_probes_ports_and_limits_fit(path: Path, tmp_path: Path) -> None:
    ((pod, container),) = ours(path)
    settings = settings_of(path, container["args"], tmp_path)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["metrics"] == int(settings.admin.metrics_addr.rpartition(":")[2])
    probes = [container[name]["httpGet"] for name in container if name.endswith("Probe")]
    assert len(probes) == 2
    assert {probe["path"] for probe in probes} <= PROBED
    assert {probe["port"] for probe in probes} == {"metrics"}
    hook = container.get("lifecycle", {}).get("preStop", {"exec": {"command": ["sleep", "0"]}})
    leaving_s = float(hook["exec"]["command"][1])
    assert settings.listener.drain_s + leaving_s < pod["terminationGracePeriodSeconds"]
    # As docs/operations.md sizes it.
    requested = parse_size_bytes(container["resources"]["requests"]["memory"])
    assert requested >= settings.watch.history_bytes_total_max * 1.5
    memory = parse_size_bytes(container["resources"]["limits"]["memory"])
    assert settings.watch.history_bytes_total_max <= memory / 2
    security = {**pod["securityContext"], **container["securityContext"]}
    assert security["runAsNonRoot"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]


def settings_of(path: Path, arguments: list[str], directory: Path) -> Settings:
    """Return the settings from a container's arguments and its ConfigMap."""
    assert arguments[0] == "serve"
    from proxy.cli.knobs import settings_of as read

    read_arguments = list(arguments[1:])
    for number, argument in enumerate(read_arguments):
        if argument.startswith("--config="):
            (config,) = (document for document in documents(path) if document["kind"] == "ConfigMap")
            file = directory / "watchmux.toml"
            file.write_text(config["data"][Path(argument.removeprefix("--config=")).name])
            # The certificates do not exist here.
            return merge_settings({}, file, [], look_at_files=False)[0]
        assert argument.split("=")[0] in {knob.flag for knob in knobs()}, number
    from proxy.cli.serve import command

    with command.make_context("serve", read_arguments) as context:
        return read(context)[0]


def test_services_lead_to_the_pods() -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for document in documents(CONFIGS / "kubernetes/deployment.yaml"):
        by_kind.setdefault(document["kind"], []).append(document)
    (deployment,) = by_kind["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    names = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    for service in by_kind["Service"]:
        assert service["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert by_kind[kind][0]["spec"][key]["matchLabels"].items() <= labels


def test_leaves_take_their_watches_from_the_hubs(tmp_path: Path) -> None:
    hubs, leaves = CONFIGS / "kubernetes/hubs.yaml", CONFIGS / "kubernetes/leaves.yaml"
    ((_, container),) = ours(leaves)
    leaf = settings_of(leaves, container["args"], tmp_path)
    ((_, container),) = ours(hubs)
    hub = settings_of(hubs, container["args"], tmp_path)
    assert leaf.upstream.endpoints == hub.upstream.endpoints
    assert not hub.upstream.watch_endpoints
    found = {document["kind"]: document for document in documents(hubs)}
    pods, service = found["StatefulSet"], found["Service"]
    assert pods["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    port = hub.listener.listen_addr.rpartition(":")[2]
    name = pods["metadata"]["name"]
    assert leaf.upstream.watch_endpoints == [
        f"http://{name}-{number}.{service['metadata']['name']}:{port}" for number in range(pods["spec"]["replicas"])
    ]
    (scaler,) = (one for one in documents(leaves) if one["kind"] == "HorizontalPodAutoscaler")
    (deployment,) = (one for one in documents(leaves) if one["kind"] == "Deployment")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_pods_leave_the_service_before_they_drain_and_stay_apart() -> None:
    (deployment,) = (one for one in documents(CONFIGS / "kubernetes/deployment.yaml") if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    # At least one period of the endpoints' controller and the kube-proxies.
    assert float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1]) >= 5
    (term,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    labels = term["podAffinityTerm"]["labelSelector"]["matchLabels"]
    assert labels.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_alerts_select_what_is_scraped() -> None:
    """Each way to scrape, by address, by annotation or by the operator, gives the job that the alerts name."""
    alerts = (CONFIGS / "prometheus/alerts.yml").read_text()
    (job,) = set(re.findall(r'job="([^"]*)"', alerts))
    (by_address,) = yaml.safe_load((CONFIGS / "prometheus/scrape.yml").read_text())["scrape_configs"]
    (by_annotation,) = yaml.safe_load((CONFIGS / "prometheus/scrape-kubernetes.yml").read_text())["scrape_configs"]
    assert by_address["job_name"] == job
    assert by_annotation["relabel_configs"][-1] == {"target_label": "job", "replacement": job}
    (deployment,) = (one for one in documents(CONFIGS / "kubernetes/deployment.yaml") if one["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    ports = {port["name"]: str(port["containerPort"]) for port in template["spec"]["containers"][0]["ports"]}
    annotations = template["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": ports["metrics"]}
    (monitor,) = documents(CONFIGS / "prometheus/podmonitor.yaml")
    labels = template["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["spec"]["jobLabel"]] == job
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in ports


def test_alerts_use_exported_metrics_and_are_documented() -> None:
    (group,) = yaml.safe_load((CONFIGS / "prometheus/alerts.yml").read_text())["groups"]
    advice = (ROOT / "docs/troubleshooting.md").read_text()
    for rule in group["rules"]:
        check_expression(rule["expr"])
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert f"\n### {rule['alert']}\n" in advice
        assert rule["annotations"]["runbook_url"] == f"docs/troubleshooting.md#{rule['alert'].lower()}"


def test_the_dashboard_uses_exported_metrics_without_overlaps() -> None:
    dashboard = json.loads((CONFIGS / "grafana/watchmux.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel.get("targets", []):
            check_expression(target["expr"])
            # The quantile of several proxies together hides the one that is slow.
            quantile = re.search(r"histogram_quantile\(\S+ (sum by \(instance, (?:\w+, )?le\))?", target["expr"])
            assert quantile is None or quantile[1], target["expr"]
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", []))
    for name in ("watchmux_cover_events_total", "grpc_server_handled_total", "grpc_server_handling_seconds_bucket"):
        assert name in shown
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identities)) == len(identities)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "job", "instance"}


def test_the_image_is_small_unprivileged_and_starts_the_program() -> None:
    parser = DockerfileParser(fileobj=io.BytesIO((CONFIGS / "container/Containerfile").read_bytes()))
    steps = [(step["instruction"], step["value"]) for step in parser.structure]
    told = dict(steps)
    user = told["USER"].split(":")[0]
    assert int(user) > 0
    assert json.loads(told["ENTRYPOINT"]) == ["watchmux"]
    # Without endpoints a container must not serve a store that loses its data.
    assert dict(parser.envs)["WATCHMUX_BUNDLED_STORE"] == "false"
    arguments = json.loads(told["CMD"])
    assert arguments[0] == "serve"
    assert {argument.split("=")[0] for argument in arguments[1:]} <= {knob.flag for knob in knobs()}
    images = [value.split()[0] for instruction, value in steps if instruction == "FROM"]
    assert len(images) == 2
    assert all(":" in image and not image.endswith(":latest") for image in images)
    copied = [value.split()[:-1] for instruction, value in steps if instruction == "COPY" and "--from" not in value]
    # It is built from the wheel (`make wheel`) and the lock file; the build context has nothing else.
    assert copied == [["requirements.lock"], ["dist"]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in ignored if not line.startswith("#")] == ["*", "!dist", "!requirements.lock"]
    assert (ROOT / "requirements.lock").exists()
    assert f"dist/watchmux-{VERSION}-" in told["RUN"]
    assert f"-t watchmux:{VERSION} " in (CONFIGS / "container/Containerfile").read_text()
    assert PAGES, "pages are package data, which the wheel brings along"


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # directives have capitals
    parser.read(CONFIGS / "systemd/watchmux.service")
    return parser


def test_the_unit_fits_the_production_settings() -> None:
    service = unit()["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[1] == "serve"
    assert {part.split("=")[0] for part in command[2:]} <= {knob.flag for knob in knobs()} | {"--config"}
    settings = merge_settings({}, CONFIGS / "production.toml", [], look_at_files=False)[0]
    assert settings.listener.drain_s < int(service["TimeoutStopSec"])
    assert settings.listener.connections_max < int(service["LimitNOFILE"])
    assert Settings().listener.connections_max < int(service["LimitNOFILE"])
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    text = (CONFIGS / "systemd/watchmux.service").read_text()
    assert "\nEnvironment=WATCHMUX_BUNDLED_STORE=false\n" in text
    assert service["EnvironmentFile"] == "-/etc/watchmux/watchmux.env"
    # The keys come from systemd, in place of the file's: only root can read those.
    upstream, listener = settings.upstream, settings.listener
    for variable, path in (("WATCHMUX_KEY", upstream.key), ("WATCHMUX_KEY_FILE", listener.key_file)):
        assert f"\nLoadCredential={Path(path).name}:{path}\n" in text
        assert f"{variable}=%d/{Path(path).name}" in text
        assert variable in {knob.env for knob in knobs()}
    check = shlex.split(service["ExecStartPre"])
    assert [check[0], *check[3:]] == [command[0], *command[2:]]
    # proxy/process/service_manager.py notifies systemd; three probes detect a hang, then the watchdog must expire.
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert int(service["WatchdogSec"]) > HUNG_AFTER * settings.admin.probe_interval_s
    assert "AF_UNIX" in service["RestrictAddressFamilies"]


def tool(name: str, package: str) -> str:
    """Return a tool from a Debian package; install it if it is missing."""
    if shutil.which(name) is None:
        subprocess.run(["apt-get", "update", "-qq"], check=True, timeout=300)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
        subprocess.run(install, check=True, timeout=600)
    return name


@pytest.mark.long
@pytest.mark.timeout(900)
def test_promtool_takes_the_alerts_and_their_stories(tmp_path: Path) -> None:
    promtool = tool("promtool", "prometheus")
    directory = CONFIGS / "prometheus"
    # Debian's promtool knows no Kubernetes; it checks the rest.
    pods = (directory / "scrape-kubernetes.yml").read_text()
    pods = re.sub(r"kubernetes_sd_configs:\n +- role: pod\n", "static_configs: [{targets: [a:1]}]\n", pods)
    (tmp_path / "pods.yml").write_text(pods)
    for command in (
        "check rules alerts.yml",
        "test rules alerts_test.yml",
        "check config scrape.yml",
        f"check config {tmp_path}/pods.yml",
    ):
        told = subprocess.run(
            [promtool, *command.split()], cwd=directory, capture_output=True, text=True, timeout=60, check=False
        )
        assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    installed = tmp_path / "watchmux.service"
    # systemd-analyze checks that the program exists, which is elsewhere here.
    text = (CONFIGS / "systemd/watchmux.service").read_text()
    installed.write_text(text.replace("/opt/watchmux/bin/watchmux", "/bin/true"))
    told = subprocess.run(
        [analyze, "verify", "--man=no", installed], capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
