"""What `deploy/` names is there: settings, commands, ports, paths, metrics; and its manifests are valid by schema.

Nothing here starts a container: see deploy/README.md for what has never run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from app.cli import app
from app.settings import Settings
from serving.engines.sglang_server import SGLangConfig
from serving.model import BASE_ID

DEPLOY = Path(__file__).parent.parent / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name != "whetstone.json")
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield path.name, document


def objects(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for _, one in documents() if one["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    found = {}
    for kind in ("Deployment", "StatefulSet"):
        found |= {name: one["spec"]["template"] for name, one in objects(kind).items()}
    return found | {name: one["spec"]["jobTemplate"]["spec"]["template"] for name, one in objects("CronJob").items()}


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods().items():
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield f"{name}/{container['name']}", container


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_variable_is_a_setting(path: Path) -> None:
    known = {f"WHETSTONE_{name.upper()}" for name in Settings.model_fields} | {"WHETSTONE_CONFIG"}
    named = set(re.findall(r"\bWHETSTONE_[A-Z_]+", path.read_text()))
    assert named <= known, f"{named - known} are no settings"


def commands(compose: dict[str, Any]) -> Iterator[list[str]]:
    for service in compose["services"].values():
        yield service.get("command", [])
    for _, container in containers():
        yield container.get("args", [])
    for unit in (DEPLOY / "systemd").glob("*.service"):
        for line in re.findall(r"^ExecStart=(.+)$", unit.read_text(), re.MULTILINE):
            program, *rest = shlex.split(line)
            yield [Path(program).name, *rest]
    (line,) = re.findall(r"^CMD (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    yield yaml.safe_load(line)


def test_every_command_is_one_of_ours(compose: dict[str, Any]) -> None:
    root: Any = get_command(app)
    ours = [command[1:] for command in commands(compose) if command[:1] == ["whetstone"]]
    assert len(ours) >= 6
    for name, *options in ours:
        its = {spelling for parameter in root.commands[name].params for spelling in parameter.opts}
        assert set(options) <= its, f"whetstone {name} has no {set(options) - its}"


def test_containers_use_the_ports_and_paths_that_are_served(compose: dict[str, Any]) -> None:
    defaults = Settings.model_fields
    served = {defaults["api_port"].default, defaults["web_port"].default}
    published = {int(port.rsplit(":", 1)[1]) for port in compose["services"]["whetstone"]["ports"]}
    endpoint = pods()["whetstone"]["spec"]["containers"][0]
    ports = {port["containerPort"] for port in endpoint["ports"]}
    service = {port["port"] for port in objects("Service")["whetstone"]["spec"]["ports"]}
    exposed = re.search(r"^EXPOSE (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed is not None
    assert published == ports == service == {int(port) for port in exposed[1].split()} == served
    for probe in ("startupProbe", "readinessProbe"):
        assert endpoint[probe]["httpGet"]["path"] == "/healthz"
    annotations = pods()["whetstone"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] == "/metrics"
    scraped = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"][0]
    assert (scraped["metrics_path"], scraped["static_configs"][0]["targets"]) == ("/metrics", ["whetstone:8000"])


def test_everybody_reads_the_model_and_the_versions_by_one_path(compose: dict[str, Any]) -> None:
    model = f"/data/models/{BASE_ID}/hf"
    for arguments in (
        compose["services"]["sglang"]["command"],
        pods()["sglang"]["spec"]["containers"][0]["args"],
    ):
        assert f"--model-path={model}" in arguments
    settings = objects("ConfigMap")
    assert settings["whetstone-engine"]["data"]["WHETSTONE_ENGINE_MODEL"] == model
    assert compose["x-whetstone"]["environment"]["WHETSTONE_ENGINE_MODEL"] == model
    assert settings["whetstone"]["data"]["WHETSTONE_HOME"] == "/data"
    for name in ("whetstone", "sglang", "whetstone-train"):
        spec = pods()[name]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        (shared,) = [volume["name"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
        assert mounts[shared] == "/data"


def test_sglang_is_started_as_whetstone_would_start_it(compose: dict[str, Any]) -> None:
    config = SGLangConfig("/model", Path("log"))
    ours = [word for word in config.command(1, Path("keys")) if word.startswith("--")]
    for arguments in (compose["services"]["sglang"]["command"], pods()["sglang"]["spec"]["containers"][0]["args"]):
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        elsewhere = {"--config", "--context-length", "--tp-size", "--max-loras-per-batch"}  # a file's, or as they are
        assert {word for word in ours if word.startswith("--")} - elsewhere <= given
        targets = arguments[arguments.index("--lora-target-modules") + 1 :][:7]
        assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_as_many_replicas_are_named_as_there_are() -> None:
    replicas = objects("StatefulSet")["sglang"]["spec"]["replicas"]
    expected = [f"http://sglang-{number}.sglang:30000" for number in range(replicas)]
    assert objects("ConfigMap")["whetstone-engine"]["data"]["WHETSTONE_ENGINE_URLS"].split(",") == expected
    router = pods()["sglang-router"]["spec"]["containers"][0]["args"]
    assert router[router.index("--worker-urls") + 1 :] == expected


def test_secrets_are_referred_to_and_complete() -> None:
    kept = set(objects("Secret")["whetstone"]["stringData"])
    asked = set()
    for name, container in containers():
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] == "whetstone"
                asked.add(reference["key"])
            else:
                assert not re.search("KEY|PASSWORD|URL", variable["name"]), f"{name}: {variable['name']} is in the open"
    assert asked == kept
    assert (
        "secret.example.yaml" not in yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["resources"]
    )


def test_no_container_is_root_or_may_become_it() -> None:
    for pod in pods().values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert not pod["spec"]["automountServiceAccountToken"]
    for name, container in containers():
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]}), name
        assert container["resources"]["limits"], name


def test_the_kustomization_names_every_manifest() -> None:
    listed = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["resources"]
    by_hand = {"kustomization.yaml", "secret.example.yaml", "train.yaml"}  # the last is one run on many GPUs
    there = {path.name for path in MANIFESTS} - by_hand
    assert set(listed) == there


def test_manifests_fit_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for name, document in documents():
        if document["kind"] != "Kustomization":
            try:
                validate.validate(document, "1.30", strict=True)
            except validate.ValidationError as error:
                raise AssertionError(f"{name}: {document['kind']}: {error.message} at {list(error.path)}") from error


def test_the_dashboard_is_where_grafana_is_told(compose: dict[str, Any]) -> None:
    mounted = [volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"]]
    for source, _ in mounted:
        assert (DEPLOY / source).exists()
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/whetstone.yaml").read_text())["providers"][0]
    assert any(target.startswith(provider["options"]["path"] + "/") for _, target in mounted)
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["type"] == "prometheus"


def test_the_environment_example_has_every_variable_of_the_compose_file() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{([A-Z_]+)", text))
    given = set(re.findall(r"^([A-Z_]+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    assert asked == given


def test_what_the_image_copies_is_there_and_let_in() -> None:
    let_in = {line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        for word in line.split()
    }
    assert copied == let_in
    assert all((DEPLOY.parent / name).exists() for name in copied)
