"""Files that start the service elsewhere name flags, files and series that exist."""

import re
from pathlib import Path

import pytest
import yaml

from jrm_jax import serve
from jrm_jax.service import limits
from jrm_jax.service.metrics import Metrics
from jrm_jax.service.refusals import STATUS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "launch" / "serve"


def load(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def grace_of(args) -> float:
    """Seconds that the process may take to end: draining, and its last answers."""
    return limits.from_flags(args).drain_s + 10


def test_the_images_of_the_service():
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.+?)(?=^FROM|\Z)", text, re.M | re.S))
    stage = stages["serve"]
    for name in " ".join(re.findall(r"^COPY (.+) \S+$", stage, re.M)).split():
        assert list(ROOT.glob(name)), name
    for accelerator in ("gpu", "tpu"):
        assert (ROOT / f"requirements-{accelerator}.txt").exists()
    (entry,) = re.findall(r"^ENTRYPOINT \[(.+)\]$", stage, re.M)
    assert "jrm_jax.serve" in entry and "--host=0.0.0.0" in entry
    assert stage.index("USER jrm") < stage.index("ENTRYPOINT")


def test_compose():
    (found,) = load("compose.yaml")
    rewards, prometheus = (found["services"][name] for name in ("rewards", "prometheus"))
    args = serve.parse_args(rewards["command"])
    assert args.token_file and args.model == "/model"
    assert int(rewards["stop_grace_period"].rstrip("s")) > grace_of(args)
    assert rewards["build"]["target"] == "serve"
    assert (FOLDER / rewards["build"]["context"]).resolve() == ROOT
    for service in (rewards, prometheus):
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["secrets"] == ["token"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (FOLDER / source).exists(), source
    (config,) = load("prometheus.yaml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["rewards:8080"]}]
    assert job["authorization"]["credentials_file"] == str(args.token_file)


def test_alerts_name_series_and_reasons_that_exist():
    metrics = Metrics()
    metrics.rejections.labels("queue_full").inc()
    series = {name: one for name, one in vars(metrics).items() if name != "registry"}
    labels = {f"jrm_{name}_total": one._labelnames for name, one in series.items()}
    known = set(re.findall(r"^# TYPE (\w+)", metrics.text().decode(), re.M))
    known |= {f"{name}_bucket" for name in known}
    (groups,) = load("alerts.yaml")
    rules = groups["groups"][0]["rules"]
    assert len(rules) >= 6
    for rule in rules:
        named = set(re.findall(r"jrm_\w+", rule["expr"]))
        assert named <= known, named - known
        assert set(re.findall(r'reason="(\w+)"', rule["expr"])) <= set(STATUS)
        assert rule["annotations"]["summary"]
        # Prometheus joins two series only where all their labels are the same
        summed = set(re.findall(r"without \((\w+)\)", rule["expr"]))
        kept = {frozenset(labels.get(name, ())) - summed for name in named}
        assert len(kept) == 1 or "_bucket" in rule["expr"], rule["alert"]


def test_the_deployment():
    deployment, service = load("deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = serve.parse_args(container["args"])
    assert args.token_file and pod["terminationGracePeriodSeconds"] > grace_of(args)
    probes = [container[name]["httpGet"]["path"] for name in ("readinessProbe", "livenessProbe")]
    assert probes == ["/ready", "/health"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    ports = container["ports"][0]["containerPort"], service["spec"]["ports"][0]["port"]
    assert ports == (args.port, args.port)


def templates(node):
    """Every template of a pod in a file for Kubernetes."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", ()):
            yield node
        node = node.values()
    if not isinstance(node, str) and hasattr(node, "__iter__"):
        for one in node:
            yield from templates(one)


@pytest.mark.parametrize("path", ["launch/serve/deployment.yaml", "launch/jobset.yaml"])
def test_pods_that_mount_a_bucket_ask_for_what_mounts_it(path):
    """GKE puts the container that mounts buckets into pods with this annotation, and no others. On
    the host's network it needs to be told whose account to use; an image's own user, who it is."""
    text = (ROOT / "Dockerfile").read_text()
    (user,) = re.findall(r"^RUN useradd .*--uid (\d+)", text, re.M)
    found = list(templates(list(yaml.safe_load_all((ROOT / path).read_text()))))
    assert found
    for template in found:
        mounts = [v["csi"] for v in template["spec"]["volumes"] if "csi" in v]
        assert [mount["driver"] for mount in mounts] == ["gcsfuse.csi.storage.gke.io"]
        attributes = mounts[0]["volumeAttributes"]
        host = template["spec"].get("hostNetwork", False)
        assert attributes.get("hostNetworkPodKSA") == ("true" if host else None)
        if "serve" in path:
            assert f"uid={user},gid={user}" in attributes["mountOptions"]
        assert template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


@pytest.mark.parametrize("page", ["docs/serving.md", "README.md"])
def test_flags_that_documents_name_exist(page):
    text = (ROOT / page).read_text()
    known = set(vars(serve.parse_args(["--model=x"])))
    for line in re.findall(r"jrm_jax\.serve (.*)", text):
        named = set(re.findall(r"--(\w+)", line))
        assert named <= known, named - known
