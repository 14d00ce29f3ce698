"""The work pools `docker` and `kubernetes`, and the manifests, as far as they can be judged without an engine."""

import json
import re
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values

from tests import compose

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deployments" / "kubernetes"
KNOWN = (
    Path(prefect.__file__).parent / "server" / "api" / "collections_data" / "views" / "aggregate-worker-metadata.json"
)
SECRET = re.compile("PASSWORD|TOKEN")
COMPOSE = compose.load({"POSTGRES_PASSWORD": "secret"})
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OBJECTS = [
    one
    for name in yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    for one in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
]
PODS = {one["metadata"]["name"]: one["spec"]["template"] for one in OBJECTS if "template" in one.get("spec", {})}


def template(kind: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "deployments" / "pools" / f"{kind}.json").read_text(encoding="utf-8"))
    return read


def filled(kind: str, **values: object) -> dict[str, Any]:
    """The configuration of a run as Prefect's worker makes it of the defaults and these values."""
    variables = template(kind)["variables"]["properties"]
    defaults = {name: one["default"] for name, one in variables.items() if "default" in one}
    made: dict[str, Any] = apply_values(template(kind)["job_configuration"], defaults | values)
    return made


def named(kind: str) -> dict[str, Any]:
    return {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == kind}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_prefect_takes_the_definition_of_a_pool(kind: str) -> None:
    WorkPoolCreate(name=kind, type=kind, base_job_template=template(kind))  # each placeholder has a variable
    known = json.loads(KNOWN.read_text(encoding="utf-8"))[f"prefect-{kind}"][kind]["default_base_job_configuration"]
    # The first is newer than Prefect's own list: prefect-docker 0.7.4 has it.
    assert template(kind)["job_configuration"].keys() - {"container_create_kwargs"} <= known["job_configuration"].keys()
    own = {"nano_cpus", "cpu", "memory", "homes_claim", "data_claim"}
    for name, one in template(kind)["variables"]["properties"].items():
        assert name in own or one["type"] == known["variables"]["properties"][name]["type"]


def test_a_run_in_a_container_has_what_a_worker_of_compose_has() -> None:
    run, worker = filled("docker", name="x", labels={}), SERVICES["worker"]
    assert run["image"] == worker["image"]
    assert run["command"].split()[:3] == worker["command"][:3]
    assert {volume.partition("_")[2] for volume in run["volumes"]} == set(worker["volumes"])
    assert {volume.partition("_")[0] for volume in run["volumes"]} == {COMPOSE["name"]}
    assert run["networks"] == [f"{COMPOSE['name']}_default"]
    own = run["container_create_kwargs"]
    assert {"/home": worker["tmpfs"][0].partition(":")[2]} == own.pop("tmpfs")
    assert own == {name: worker[name] for name in own}
    assert run["memswap_limit"] == run["mem_limit"]
    given = worker["environment"]
    assert {name: run["env"][name] for name in run["env"] if name != "HOME"}.items() <= given.items()


def test_a_node_has_one_run_with_a_home_of_its_own() -> None:
    job = filled("kubernetes", name="x", labels={})["job_manifest"]["spec"]["template"]
    [container] = job["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "homes"]
    assert mount["subPathExpr"] == f"$({container['env'][0]['name']})"
    kinds = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in (job, PODS["worker"])}
    for pod in (job, PODS["worker"]):
        [rule] = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        assert {word for one in rule["labelSelector"]["matchExpressions"] for word in one["values"]} == kinds
    claims = [one["persistentVolumeClaim"]["claimName"] for one in job["spec"]["volumes"] if one["name"] != "scratch"]
    assert set(claims) <= named("PersistentVolumeClaim").keys()


def test_the_schema_of_kubernetes_has_all_of_it() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = filled("kubernetes", name="x", labels={"a": "b"})["job_manifest"]
    [container] = job["spec"]["template"]["spec"]["containers"]
    container["args"] = container["args"].split()  # as Prefect's worker does
    for one in (*OBJECTS, job):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", sorted(PODS))
def test_a_pod_runs_what_compose_runs_and_may_do_as_little(name: str) -> None:
    pod, service = PODS[name]["spec"], SERVICES[name]
    [container] = pod["containers"]
    mounts, volumes = container["volumeMounts"], {one["name"] for one in pod["volumes"]}
    [owner] = [one for one in OBJECTS if one["metadata"]["name"] == name and "template" in one.get("spec", {})]
    volumes |= {one["metadata"]["name"] for one in owner["spec"].get("volumeClaimTemplates", ())}
    assert {one["name"] for one in mounts} == volumes
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is service["read_only"]
    assert container["securityContext"]["capabilities"] == {"drop": service["cap_drop"]}
    if name == "postgres":
        assert container["image"] == service["image"]
        return
    assert container["image"] == "slmops"
    assert [word for word in container["args"] if not word.startswith("$(")] == [
        word for word in service["command"] if word
    ]
    held = {one["name"]: one.get("value", "") for one in container.get("env", ())}
    for source in container["envFrom"]:
        held |= named("ConfigMap")[source["configMapRef"]["name"]]["data"]
    left_out = ("AWS_", "MLFLOW_S3_", "PREFECT_WORKER_WEBSERVER_HOST")
    given = {key: value for key, value in service["environment"].items() if value and not key.startswith(left_out)}
    assert {key: held.get(key) for key in given} == {**given, **{key: "" for key in given if SECRET.search(key)}}


def test_the_image_is_that_of_compose() -> None:
    [image] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))["images"]
    [container] = filled("kubernetes")["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert {f"{image['name']}:{image['newTag']}", container["image"]} == {SERVICES["worker"]["image"]}
