"""The manifests of deploy/kubernetes: built as they are applied, checked against Kubernetes' own schemas, and against
what the server, its image and its settings really are.

The custom resources (ServiceMonitor, PrometheusRule, ScaledObject) are checked here field by field: their schemas come
with their operators and in no package of PyPI's.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import settings
from serve.gateway.keys import KeyRing
from serve.gateway.keys import add as add_key
from serve.gateway.routes import find
from serve.telemetry.metrics import Metrics
from tests.running import ROOT
from workers.settings import pose_workers

HERE = ROOT / "deploy/kubernetes"
README = (HERE / "README.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KUBERNETES = ("1.30", "1.37")  # the oldest and the newest version that the manifests are checked against
QUEUE_METRIC = "pose_queue_detections"
SERVER = {"app.kubernetes.io/name": "pem-server", "app.kubernetes.io/component": "server"}
CUSTOM = ("ServiceMonitor", "PrometheusRule", "ScaledObject")
OWN_MEMORY = 2 * 2**30  # of all processes, before caches, bodies and shared memory

#: What is built, by name: an overlay of the folder, or components laid over one as README.md says to.
BUILDS = {
    "cpu": ("cpu", []),
    "gpu": ("gpu", []),
    "cpu with everything": ("cpu", ["library", "monitoring", "hpa"]),
    "gpu with everything": ("gpu", ["library", "monitoring", "hpa"]),
    "gpu with keda": ("gpu", ["monitoring", "keda"]),
}
Manifest = dict[str, Any]


@functools.cache
def builder() -> list[str]:
    """Return the command that builds a kustomization; skip the test if there is none."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        asked = ["kubectl", "version", "--client", "--output=json"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout
        if "kustomizeVersion" in told:
            return ["kubectl", "kustomize"]
    pytest.skip("needs kubectl 1.24 or later, or kustomize")


@functools.cache
def build(folder: Path) -> tuple[Manifest, ...]:
    """Return what `kubectl apply -k` would send."""
    done = subprocess.run([*builder(), str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a deprecated spelling, probably"
    return tuple(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the folder, so that a test may add kustomizations."""
    return Path(shutil.copytree(HERE, tmp_path_factory.mktemp("kubernetes") / "kubernetes"))


def manifests(copied: Path, name: str) -> tuple[Manifest, ...]:
    """Return the manifests of one of BUILDS."""
    overlay, components = BUILDS[name]
    folder = copied / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    tree = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../overlays/{overlay}"],
        "components": [f"../components/{component}" for component in components],
        "namespace": "pem",
        "images": [{"name": "pem-server", "newName": "registry.example/pem-server", "newTag": overlay}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(tree))
    return build(folder)


@pytest.fixture(params=BUILDS)
def built(request: pytest.FixtureRequest, copied: Path) -> tuple[Manifest, ...]:
    """Return the manifests of each of BUILDS in turn."""
    return manifests(copied, request.param)


def of_kind(built: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    """Return the manifests of a kind, by name."""
    return {one["metadata"]["name"]: one for one in built if one["kind"] == kind}


def pod_of(workload: Manifest) -> Manifest:
    pod: Manifest = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: Manifest) -> Manifest:
    """Return the one container that serves."""
    (container,) = pod_of(workload)["containers"]
    found: Manifest = container
    return found


def environment_of(workload: Manifest) -> dict[str, str]:
    """Return the environment of the server's process: the image's variables, overridden by the container's."""
    image = dict(re.findall(r"^ +(PEM_\w+)=(\S+?)(?: \\)?$", DOCKERFILE, re.MULTILINE))
    assert set(image) == {"PEM_HOST", "PEM_PORT", "PEM_DATA_DIR"}
    return image | {variable["name"]: variable["value"] for variable in container_of(workload)["env"]}


def settings_of(built: tuple[Manifest, ...], workload: Manifest, folder: Path) -> settings.Settings:
    """Return the server's settings: the mounted file, loaded as `pem serve --config` loads it."""
    volume = next(one for one in pod_of(workload)["volumes"] if one["name"] == "settings")
    file = folder / "pem.toml"
    file.write_text(of_kind(built, "ConfigMap")[volume["configMap"]["name"]]["data"]["pem.toml"])
    return settings.load(file, environment=environment_of(workload))


def size(text: str) -> float:
    """Return a quantity of memory in bytes, or of cores."""
    number, unit = re.fullmatch(r"([0-9.]+)(Mi|Gi|m|)", str(text)).groups()
    return float(number) * {"Mi": 2**20, "Gi": 2**30, "m": 1e-3, "": 1.0}[unit]


def volumes_of(workload: Manifest) -> dict[str, Manifest]:
    """Return the volumes by mount path."""
    by_name = {volume["name"]: volume for volume in pod_of(workload)["volumes"]}
    return {mount["mountPath"]: by_name[mount["name"]] for mount in container_of(workload)["volumeMounts"]}


def within(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def labels_of(workload: Manifest) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


# ---- schemas


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_manifest_is_what_kubernetes_knows(built, version):
    checker = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the dev extra")
    checked = [one for one in built if one["kind"] not in CUSTOM]
    for one in checked:
        checker.validate(one, version, strict=True)
    assert {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"} <= {
        one["kind"] for one in checked
    }


def test_the_schemas_would_notice_a_typo(copied):
    checker = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the dev extra")
    workload = yaml.safe_load((HERE / "base/server.yaml").read_text())
    checker.validate(workload, KUBERNETES[-1], strict=True)
    container_of(workload)["redinessProbe"] = container_of(workload).pop("readinessProbe")
    with pytest.raises(checker.ValidationError, match="redinessProbe"):
        checker.validate(workload, KUBERNETES[-1], strict=True)


def test_the_service_monitor_scrapes_the_metrics_of_each_replica_once(copied):
    built = manifests(copied, "gpu with everything")
    monitor = of_kind(built, "ServiceMonitor")["pem-server"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert set(endpoint) == {"port", "path", "interval", "scrapeTimeout"}
    assert "GET" in find(endpoint["path"]).methods
    assert int(endpoint["scrapeTimeout"].removesuffix("s")) < int(endpoint["interval"].removesuffix("s"))
    selected = [
        one
        for one in of_kind(built, "Service").values()
        if within(monitor["spec"]["selector"]["matchLabels"], one["metadata"]["labels"])
    ]
    assert [port["name"] for one in selected for port in one["spec"]["ports"]] == [endpoint["port"]]
    # Without jobLabel the job is called as the Service is, and the rules ask for that name.
    assert [one["metadata"]["name"] for one in selected] == ["pem-server"]


def test_the_operators_rules_are_those_of_the_rule_files(copied):
    rule = of_kind(manifests(copied, "gpu with everything"), "PrometheusRule")["pem-server"]
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    files = [
        yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text()) for name in ("recording.yml", "alerts.yml")
    ]
    groups = [group for file in files for group in file["groups"]]
    assert rule["spec"] == {"groups": groups}, "make prometheus-rule.yaml again, as its first lines say"
    assert len({group["name"] for group in groups}) == len(groups) > 1


# ---- the image and the server


def test_the_ports_are_the_images_and_find_each_other(built):
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    for workload in of_kind(built, "Deployment").values():
        (port,) = container_of(workload)["ports"]
        assert (port["name"], port["containerPort"]) == ("http", int(exposed))
        assert environment_of(workload)["PEM_PORT"] == exposed
    (service_port,) = of_kind(built, "Service")["pem-server"]["spec"]["ports"]
    assert (service_port["port"], service_port["targetPort"]) == (int(exposed), "http")


def test_probes_ask_routes_that_need_no_key_and_say_what_they_are_for(built):
    for workload in of_kind(built, "Deployment").values():
        container = container_of(workload)
        paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
        assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
        for name, path in paths.items():
            assert "GET" in find(path).methods
            assert container[name]["httpGet"]["port"] == "http"
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 180, "as the image's health check allows"


def test_the_settings_load_and_name_what_is_mounted(built, tmp_path):
    for name, workload in of_kind(built, "Deployment").items():
        loaded = settings_of(built, workload, tmp_path)
        assert (loaded.host, loaded.port, loaded.data_dir) == ("0.0.0.0", 8003, "/data")
        mounts = volumes_of(workload)
        for path in (loaded.data_path, loaded.objects_path, loaded.cad_path, loaded.output_path, loaded.keys_path):
            assert any(path.is_relative_to(mount) for mount in mounts), path
        assert loaded.spool_dir in mounts
        args = container_of(workload)["args"]
        assert args[:3] == ["pem", "serve", "--config"]
        assert args[3] == "/etc/pem/pem.toml"
        assert "/etc/pem" in mounts
        assert settings.unknown_variables(environment_of(workload)) == []
        gpus = container_of(workload)["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert loaded.device == ("cuda" if gpus else "cpu"), name


def test_the_server_gets_longer_to_end_than_it_takes(built, tmp_path):
    workload = of_kind(built, "Deployment")["pem-server"]
    word, seconds = container_of(workload)["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    assert int(seconds) >= 10, "proxies need a while to hear that the pod is leaving"
    drain_s = settings_of(built, workload, tmp_path).drain_s
    assert pod_of(workload)["terminationGracePeriodSeconds"] >= int(seconds) + drain_s + 10
    for other in of_kind(built, "Deployment").values():
        assert pod_of(other)["terminationGracePeriodSeconds"] >= drain_s + 10


def test_each_pod_satisfies_the_strictest_pod_security_standard(built):
    namespace = of_kind(built, "Namespace")["pem"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    for workload in of_kind(built, "Deployment").values():
        pod = pod_of(workload)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        for volume in pod["volumes"]:
            (kind,) = volume.keys() - {"name"}
            assert kind in ("configMap", "secret", "emptyDir", "persistentVolumeClaim")


def test_no_variable_of_the_clusters_own_can_be_taken_for_a_setting(built):
    # With service links, a Service named `pem` puts PEM_PORT=tcp://10.0.0.1:8003 into every container beside it.
    with pytest.raises(settings.SettingsError, match="PEM_PORT"):
        settings.load(environment={"PEM_PORT": "tcp://10.0.0.1:8003"})
    assert all(pod_of(one)["enableServiceLinks"] is False for one in of_kind(built, "Deployment").values())


def test_memory_and_disk_hold_what_the_settings_allow(built, tmp_path):
    for name, workload in of_kind(built, "Deployment").items():
        loaded, mounts = settings_of(built, workload, tmp_path), volumes_of(workload)
        limits = container_of(workload)["resources"]["limits"]
        shared = mounts["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        memory_mb = size(limits["memory"]) // 1_000_000
        workers = pose_workers(loaded.pose, loaded.device, int(limits["cpu"]), memory_mb)
        allowed = (loaded.limits.in_flight_mb + workers * loaded.pose.object_cache_mb) * 2**20
        assert OWN_MEMORY + allowed + size(shared["sizeLimit"]) <= size(limits["memory"]), name
        assert loaded.log.file is False, "the log would fill the volume"
        data = mounts["/data"].get("emptyDir", {}).get("sizeLimit")
        if data is not None:
            assert loaded.storage.objects_mb * 2**20 * 1.5 < size(data), name


# ---- who finds whom


def test_selectors_find_the_servers_and_nothing_else(built):
    workloads = of_kind(built, "Deployment")
    for workload in workloads.values():
        assert within(workload["spec"]["selector"]["matchLabels"], labels_of(workload))
    for kind, path in {"Service": ["selector"], "PodDisruptionBudget": ["selector", "matchLabels"]}.items():
        selector = of_kind(built, kind)["pem-server"]["spec"]
        for step in path:
            selector = selector[step]
        assert [name for name, one in workloads.items() if within(selector, labels_of(one))] == ["pem-server"]
    for constraint in pod_of(workloads["pem-server"])["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"] == SERVER


def test_every_pod_has_a_network_policy_and_only_the_server_can_be_reached(built):
    policies = of_kind(built, "NetworkPolicy")
    for name, workload in of_kind(built, "Deployment").items():
        (policy,) = [
            one for one in policies.values() if within(one["spec"]["podSelector"]["matchLabels"], labels_of(workload))
        ]
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        ports = [port["port"] for rule in policy["spec"].get("ingress", []) for port in rule["ports"]]
        assert ports == (["http"] if name == "pem-server" else [])
        assert all(rule["from"] for rule in policy["spec"].get("ingress", [])), "an empty list lets everyone in"
    names, segmentation = policies["pem-server"]["spec"]["egress"]
    assert [port["port"] for port in names["ports"]] == [53, 53, 5353, 5353]
    assert "to" not in names, "NodeLocal DNSCache is no pod of a namespace that could be selected"
    assert [port["port"] for port in segmentation["ports"]] == [8002]
    assert segmentation["to"], "an empty list lets everything out"


def test_the_rule_for_a_collector_is_there_to_be_uncommented():
    checker = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the dev extra")
    written = (HERE / "base/network.yaml").read_text()
    before, title, rule = written.partition("OTEL_EXPORTER_OTLP_ENDPOINT names one (docs/TRACING.md):\n")
    policy = yaml.safe_load(before + title + re.sub(r"(?m)^    # ", "    ", rule))
    checker.validate(policy, KUBERNETES[-1], strict=True)
    assert [port["port"] for port in policy["spec"]["egress"][-1]["ports"]] == [4318]
    assert policy["spec"]["egress"][:-1] == yaml.safe_load(written)["spec"]["egress"]


def test_one_replica_can_always_be_evicted_and_rollouts_leave_some(copied):
    for name in BUILDS:
        built = manifests(copied, name)
        assert of_kind(built, "PodDisruptionBudget")["pem-server"]["spec"]["maxUnavailable"] == 1
        workload = of_kind(built, "Deployment")["pem-server"]
        rolling = workload["spec"]["strategy"]["rollingUpdate"]
        gpus = container_of(workload)["resources"]["limits"].get("nvidia.com/gpu")
        assert rolling == ({"maxUnavailable": 1, "maxSurge": 0} if gpus else {"maxUnavailable": 0, "maxSurge": 1})
        assert gpus in (None, 1), "one replica for each GPU"


def test_one_image_line_reaches_every_container(built):
    images = {
        container["image"]
        for workload in of_kind(built, "Deployment").values()
        for container in [*pod_of(workload)["containers"], *pod_of(workload).get("initContainers", [])]
    }
    assert images in ({"registry.example/pem-server:cpu"}, {"registry.example/pem-server:gpu"})


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay_alone_names_the_image_that_the_dockerfile_builds(overlay):
    built = build(HERE / "overlays" / overlay)
    assert container_of(of_kind(built, "Deployment")["pem-server"])["image"] == f"pem-server:{overlay}"
    assert f"docker build -t pem-server:{overlay} " in DOCKERFILE


def test_a_changed_settings_file_starts_new_pods(copied):
    names = {name for flavour in ("cpu", "gpu") for name in of_kind(manifests(copied, flavour), "ConfigMap")}
    assert len(names) == 2
    assert all(re.fullmatch(r"pem-settings-[a-z0-9]{10}", name) for name in names)


# ---- objects


def test_replicas_read_the_librarys_volume_and_write_their_own(copied, tmp_path):
    built = manifests(copied, "gpu with everything")
    workloads = of_kind(built, "Deployment")
    library, server = workloads["pem-library"], workloads["pem-server"]
    claim = {"claimName": "pem-library"}
    assert "pem-library" in of_kind(built, "PersistentVolumeClaim")
    assert volumes_of(library)["/data"]["persistentVolumeClaim"] == claim
    assert library["spec"]["strategy"] == {"type": "Recreate"}, "two servers on one data directory are refused"
    assert library["spec"]["replicas"] == 1
    assert volumes_of(server)["/library"]["persistentVolumeClaim"] == claim
    assert "emptyDir" in volumes_of(server)["/data"]
    (copy,) = pod_of(server)["initContainers"]
    for container in (copy, container_of(server)):
        assert [mount.get("readOnly") for mount in container["volumeMounts"] if mount["name"] == "library"] == [True]
    inside, seen = settings_of(built, library, tmp_path), settings_of(built, server, tmp_path)
    moved = {Path("/library") / path.relative_to("/data") for path in (inside.cad_path, inside.checkpoints_path)}
    assert moved == {seen.cad_path, seen.checkpoints_path}
    assert copy["command"] == ["cp", "-R", str("/library" / inside.objects_path.relative_to("/data")), "/data/"]
    assert inside.storage == seen.storage, "what the library holds must fit into a replica"


def test_keys_that_pem_makes_are_what_the_secret_holds(copied, tmp_path):
    workload = of_kind(manifests(copied, "cpu"), "Deployment")["pem-server"]
    loaded = settings_of(manifests(copied, "cpu"), workload, tmp_path)
    secret = volumes_of(workload)[str(loaded.keys_path.parent)]["secret"]
    assert f"create secret generic {secret['secretName']} --from-file=keys.json=" in README
    assert loaded.keys_path.name == "keys.json"
    assert secret["optional"] is True
    mounted = KeyRing(tmp_path / "mounted/keys.json")
    assert not mounted, "without the Secret the service is open"
    made = [add_key(tmp_path / f"{version}/keys.json", version) for version in ("first", "second")]
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted/keys.json").symlink_to("data/keys.json")
    for version, key in zip(("first", "second"), made, strict=True):  # as a kubelet brings a Secret, and a changed one
        (tmp_path / "next").symlink_to(tmp_path / version)
        (tmp_path / "next").rename(tmp_path / "mounted/data")
        assert mounted.check(key).name == version
    assert mounted.check(made[0]) is None


# ---- autoscaling


def test_the_autoscaler_follows_a_metric_that_exists(copied):
    built = manifests(copied, "gpu with everything")
    (autoscaler,) = of_kind(built, "HorizontalPodAutoscaler").values()
    spec = autoscaler["spec"]
    workload = of_kind(built, "Deployment")[spec["scaleTargetRef"]["name"]]
    assert spec["scaleTargetRef"] == {key: workload[key] for key in ("apiVersion", "kind")} | {"name": "pem-server"}
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == QUEUE_METRIC
    assert Metrics().waiting._name == QUEUE_METRIC
    assert 1 < spec["minReplicas"] < spec["maxReplicas"]
    assert float(metric["pods"]["target"]["averageValue"]) < settings.Settings().queue.ceiling_detections
    values = yaml.safe_load((HERE / "components/hpa/prometheus-adapter.values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert rule["name"]["as"] == QUEUE_METRIC
    assert re.fullmatch(rule["name"]["matches"], QUEUE_METRIC)
    assert rule["seriesQuery"].partition("{")[0] == QUEUE_METRIC


def test_keda_scales_by_the_same_signal_between_the_same_bounds(copied):
    scaled = of_kind(manifests(copied, "gpu with keda"), "ScaledObject")["pem-server"]
    autoscaler = of_kind(manifests(copied, "gpu with everything"), "HorizontalPodAutoscaler")["pem-server"]
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    spec, other = scaled["spec"], autoscaler["spec"]
    known = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "fallback"}
    assert set(spec) == known | {"triggers", "advanced"}
    assert spec["scaleTargetRef"] == other["scaleTargetRef"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (other["minReplicas"], other["maxReplicas"])
    assert spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher", "a busy deployment must not shrink"
    assert spec["advanced"] == {"horizontalPodAutoscalerConfig": {"behavior": other["behavior"]}}
    (trigger,) = spec["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold"}
    assert trigger["metadata"]["threshold"] == other["metrics"][0]["pods"]["target"]["averageValue"]
    assert f'{QUEUE_METRIC}{{namespace="pem"}}' in trigger["metadata"]["query"]


def test_an_autoscaled_deployment_does_not_say_how_many(copied):
    for name, (_, components) in BUILDS.items():
        workload = of_kind(manifests(copied, name), "Deployment")["pem-server"]
        autoscaled = {"hpa", "keda"} & set(components)
        assert ("replicas" not in workload["spec"]) == bool(autoscaled), name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's prometheus)")
def test_both_autoscalers_queries_are_promql(tmp_path):
    values = yaml.safe_load((HERE / "components/hpa/prometheus-adapter.values.yaml").read_text())
    scaled = yaml.safe_load((HERE / "components/keda/scaled-object.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    parts = {"<<.Series>>": QUEUE_METRIC, "<<.LabelMatchers>>": 'namespace="pem",pod=~"a|b"', "<<.GroupBy>>": "pod"}
    asked = rule["metricsQuery"]
    for part, words in parts.items():
        assert part in asked
        asked = asked.replace(part, words)
    queries = [rule["seriesQuery"], asked, scaled["spec"]["triggers"][0]["metadata"]["query"]]
    rules = [{"record": f"pem:query{index}", "expr": query} for index, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "autoscaling", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rules found" in done.stdout


# ---- what the pages say


def test_the_page_on_scaling_has_the_times_of_the_manifests(copied, tmp_path):
    built = manifests(copied, "cpu")
    workload = of_kind(built, "Deployment")["pem-server"]
    leaves_s = int(container_of(workload)["lifecycle"]["preStop"]["exec"]["command"][1])
    drained_s = leaves_s + settings_of(built, workload, tmp_path).drain_s
    page = (ROOT / "docs/SCALING.md").read_text()
    for second, words in {
        leaves_s: "SIGTERM:",
        int(drained_s): "what is not done",
        pod_of(workload)["terminationGracePeriodSeconds"]: "SIGKILL",
    }.items():
        assert f"| {second} | {words}" in page


def test_the_readmes_own_kustomization_builds(copied):
    (block,) = [one for one in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "kind: Kustomization" in one]
    folder = copied / "mine"
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(block)
    built = build(folder)
    assert {"PersistentVolumeClaim", "ServiceMonitor", "HorizontalPodAutoscaler"} <= {one["kind"] for one in built}


def test_the_readmes_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", README)
    assert len(links) > 10
    assert [link for link in links if not (HERE / link).exists()] == []


def test_every_pair_of_settings_files_differs_only_where_it_says(tmp_path):
    base, gpu = (tomllib.loads((HERE / name / "pem.toml").read_text()) for name in ("base", "overlays/gpu"))
    same = ("drain_s", "keys_file", "storage", "log")
    assert {name: base[name] for name in same} == {name: gpu[name] for name in same}
