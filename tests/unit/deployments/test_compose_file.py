"""docker-compose.yml, its image and .env.example, as far as they can be judged without a container."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from prefect.settings import get_current_settings

from slmops.core.settings import Settings
from slmops.local import stack
from tests import compose
from tests.compose import FILE, MissingVariable

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
ON_WINDOWS = sys.platform == "win32"
DOCKERFILE = (ROOT / "deployments" / "Dockerfile").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
RAW: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = compose.load({"POSTGRES_PASSWORD": "secret"})["services"]
NAMES = sorted(SERVICES)
ONE_SHOTS = {"databases", "deployments", "bucket", "serve-settings"}
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY")


def variables(value: Any) -> set[str]:
    """Names of the variables in a part of the file."""
    return set(re.findall(r"\$\{(\w+)", str(value)))


@pytest.mark.parametrize(
    "command",
    [
        "check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml",
        "check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml",
        pytest.param("hadolint deployments/Dockerfile", marks=pytest.mark.skipif(ON_WINDOWS, reason="it has no wheel")),
    ],
)
def test_a_linter_finds_nothing(command: str) -> None:
    linter, *arguments = command.split()
    ended = subprocess.run([BIN / linter, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("given", [{}, {"POSTGRES_PASSWORD": ""}], ids=["no .env", "the example as it is"])
def test_a_password_is_all_it_needs_and_without_one_nothing_starts(given: dict[str, str]) -> None:
    with pytest.raises(MissingVariable, match=r"^POSTGRES_PASSWORD: set it in \.env$"):
        compose.load(given)
    assert set(re.findall(r"\$\{(\w+):\?", FILE.read_text(encoding="utf-8"))) == {"POSTGRES_PASSWORD"}
    assert SERVICES["prefect"]["ports"] == ["127.0.0.1:4200:4200"]


def test_the_example_names_every_variable_and_gives_no_secret() -> None:
    named = dict(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=(.*)$", EXAMPLE, re.MULTILINE))
    passed_on = {name for name, value in RAW["services"]["worker"]["environment"].items() if value is None}
    settings = {f"SLMOPS_{name.upper()}" for name in Settings.model_fields}
    assert set(named) == variables(RAW) | passed_on | settings
    assert {named[name] for name in named if SECRET.search(name)} == {""}


@pytest.mark.parametrize("name", NAMES)
def test_secrets_come_from_the_environment_and_go_into_no_command(name: str) -> None:
    service = RAW["services"][name]
    for key, value in service.get("environment", {}).items():
        assert not SECRET.search(key) or value is None or re.fullmatch(r"\$\{\w+:(\?[^{}]+|-)\}", value), key
    commands = [service.get("command"), service.get("healthcheck"), service.get("build")]
    assert not any(SECRET.search(variable) for variable in variables(commands))
    assert "secret" not in str([SERVICES[name].get(part) for part in ("command", "healthcheck", "build")])


def test_only_what_talks_to_postgresql_has_its_password() -> None:
    holders = {name for name, service in SERVICES.items() if "secret" in service["environment"].values()}
    assert holders == {"postgres", "databases", "prefect", "mlflow"}
    urls = [value for service in SERVICES.values() for value in service["environment"].values() if "://" in value]
    assert not any(re.search(r"//[^/@]*:[^/@]*@", url) for url in urls), "a password in a URL"


def test_images_are_pinned_and_ours_is_built_from_pinned_parts() -> None:
    for service in SERVICES.values():
        assert re.fullmatch(r"[a-z/]+:v?\d+(\.\d+)+(-[a-z0-9.]+)?", service["image"]), service["image"]
    assert {*re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)} == {"python:3.11.15-slim-trixie"}
    assert "--constraint constraints.txt" in DOCKERFILE
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1] == "10001:10001"


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {service["image"] for service in SERVICES.values() if "build" in service} == {f"slmops:{version}"}
    assert f'image.version="{version}"' in DOCKERFILE
    registered = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))
    assert f"prefect=={registered['prefect-version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert {one["work_pool"]["name"] for one in registered["deployments"]} == {stack.POOL}
    assert f"--pool={stack.POOL}" in SERVICES["worker"]["command"]
    # The PostgreSQL of the tests is of the same major version.
    said = subprocess.run([compose.program("postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    assert SERVICES["postgres"]["image"].startswith(f"postgres:{re.findall(r'[0-9]+', said)[0]}.")


def test_image_and_containers_get_the_files_that_they_need_and_no_more() -> None:
    copied = {one for line in re.findall(r"^COPY ([^-\n].*) \S+$", DOCKERFILE, re.MULTILINE) for one in line.split()}
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    assert copied == allowed == {*compose.APP, "README.md"}
    volumes = [volume for service in SERVICES.values() for volume in service.get("volumes", ())]
    assert {volume.partition(":")[0] for volume in volumes if ":" in volume} == set(RAW["volumes"])


@pytest.mark.parametrize("name", NAMES)
def test_a_container_may_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] in ("10001:10001", "postgres")
    assert not {"privileged", "cap_add", "pid", "ipc", "devices", "userns_mode"} & set(service)
    assert service["logging"]["options"]["max-size"]
    folders = [volume.partition(":")[0] for volume in service.get("volumes", ()) if ":" in volume]
    assert not any(folder.startswith(("/", ".", "~")) for folder in folders)


def test_ports_are_open_to_this_machine_and_storage_to_the_servers_only() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"prefect", "mlflow", "serve"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    listening = [compose.container_port(service) for service in SERVICES.values() if "healthcheck" in service]
    assert None not in listening
    assert len(set(listening)) == len(listening), "tests tell services apart by their ports"
    assert RAW["networks"]["storage"] == {"internal": True}
    inside = {name: of["networks"] for name, of in SERVICES.items() if "storage" in of.get("networks", ())}
    assert set(inside) == {"postgres", "s3", "databases", "prefect", "mlflow"}
    assert inside["postgres"] == inside["s3"] == ["storage"]


def test_links_lead_to_where_people_reach_the_pages() -> None:
    given = {"POSTGRES_PASSWORD": "secret", "SLMOPS_PREFECT_UI_URL": "https://p", "SLMOPS_MLFLOW_UI_URL": "https://m"}
    for variables, prefect, mlflow in (
        ({"POSTGRES_PASSWORD": "secret"}, "http://127.0.0.1:4200", "http://127.0.0.1:5000"),
        (given, "https://p", "https://m"),
    ):
        services = compose.load(variables)["services"]
        assert services["worker"]["environment"]["SLMOPS_MLFLOW_UI_URL"] == mlflow
        assert {services[name]["environment"]["PREFECT_UI_URL"] for name in ("worker", "prefect")} == {prefect}
        assert services["prefect"]["environment"]["PREFECT_SERVER_UI_API_URL"] == f"{prefect}/api"


def test_workers_can_be_many() -> None:
    assert not {"container_name", "hostname", "ports"} & set(SERVICES["worker"])
    assert "worker-tmp:/tmp" in SERVICES["worker"]["volumes"], "workers share the lock of the machine"
    assert "--limit=1" in SERVICES["worker"]["command"], "each does one thing at a time"


def test_what_a_server_must_not_forget_is_in_a_volume() -> None:
    prefect = SERVICES["prefect"]
    leases = resolve_name(prefect["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"])
    assert leases.ConcurrencyLeaseStorage().storage_path.is_relative_to(get_current_settings().home)
    assert "prefect:/home/slmops" in prefect["volumes"]


def test_nothing_is_sent_to_anybody() -> None:
    for name in set(NAMES) - {"postgres", "s3", "bucket", "serve-settings"}:
        assert stack.QUIET.items() <= SERVICES[name]["environment"].items(), name


@pytest.mark.parametrize("name", NAMES)
def test_it_waits_for_what_it_needs_and_runs_for_ever_with_a_health_check_or_once(name: str) -> None:
    service = SERVICES[name]
    assert ("healthcheck" in service) == (name not in ONE_SHOTS)
    assert service["restart"] == ("no" if name in ONE_SHOTS else "unless-stopped")
    if check := service.get("healthcheck"):
        assert check["test"][0] == "CMD", "no shell"
        assert str(compose.container_port(service)) in str(check["test"])
    for dependency, how in service.get("depends_on", {}).items():
        finished = dependency in ONE_SHOTS
        assert how["condition"] == ("service_completed_successfully" if finished else "service_healthy")
        behind_a_switch = SERVICES[dependency].get("profiles", []) != service.get("profiles", [])
        assert how.get("required", True) != (behind_a_switch and "profiles" in SERVICES[dependency])


def test_something_lasting_waits_for_each_that_runs_once() -> None:
    """Else ``docker compose up --wait`` takes its end for a failure (docker/compose#10596)."""
    lasting = [service for service in SERVICES.values() if "healthcheck" in service]
    assert {name for service in lasting for name in service.get("depends_on", ())} >= ONE_SHOTS
