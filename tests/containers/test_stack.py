"""The whole stack in containers, from the build to what is left after each kind of accident.

The tests share one project and build on each other, in the order of this file.
"""

import os
from collections.abc import Iterator

import pytest

from tests import docker, making
from tests.docker import NAME, Containers

MISSING = docker.missing()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    folder = tmp_path_factory.mktemp("containers")
    for parent in (folder, folder.parent):  # pytest's are for one user only
        parent.chmod(0o755)
    docker.build()
    containers = Containers(f"slmops-tests-{os.getpid()}", folder)
    try:
        containers.up()
        yield containers
    finally:
        containers("--profile", "*", "down", "--volumes", "--remove-orphans")


def test_a_retraining_that_a_deployment_starts_ends_with_a_champion(stack: Containers) -> None:
    stack.finish(stack.start("deploy", stack.retraining(1)))
    stack.finish(stack.retrain(1))
    assert stack.champion() == 1


def test_a_champion_is_served_to_those_who_have_the_token(stack: Containers) -> None:
    stack("--profile", "serve", "up", "--detach", "--wait")
    assert stack.answer("another").status_code == 401
    answer = stack.answer()
    assert answer.json()["choices"][0]["message"]["content"] == "ok"
    assert answer.headers["x-slmops-version"] == "1"


def test_what_a_job_makes_is_promoted_and_then_served_until_it_is_rolled_back(stack: Containers) -> None:
    stack.finish(stack.job())
    request = {"name": NAME, "version": 2, "force": "It is another version."}
    stack.finish(stack.start("promote", {"request": request}))
    assert stack.champion() == 2
    making.until(lambda: stack.answer().headers["x-slmops-version"] == "2", "version 2 is served", 120)
    stack.finish(stack.start("rollback", {"name": NAME}))
    assert stack.champion() == 1


def test_a_checkpoint_that_the_workers_user_may_not_read_is_named(stack: Containers) -> None:
    weights = stack.data / "model" / "model.safetensors"
    weights.chmod(0o600)
    run = stack.start("optimize", {"job": {"model": "/data/model"}})
    stack.finish(run, "FAILED")
    said = "/data/model/model.safetensors may not be read by the user slmops (10001)."
    assert f"Failed: {said}\n  On the machine that has it: chmod -R a+rX /data/model" in stack.told(run)
    stack.let_read()


def test_down_in_the_middle_of_a_run_frees_its_slot_and_the_run_goes_on(stack: Containers) -> None:
    before = stack.champion()
    run = stack.retrain(2)
    stack.wait_for_task(run, "fine-tune")
    assert stack.slots_taken() == 1
    stack("--profile", "*", "down")
    stack.up()
    assert stack.state(run) != "RUNNING", stack.told(run)
    stack.finish(run)
    assert stack.champion() != before


def test_a_run_gets_over_crashes_of_all_servers(stack: Containers) -> None:
    stack("--profile", "serve", "up", "--detach", "--wait")
    run = stack.retrain(4)
    for service in ("mlflow", "prefect", "postgres", "serve"):
        stack.wait_for_task(run, "")
        [container] = stack.running(service)
        if service == "postgres":
            docker.docker("restart", "--time", "60", container)
        else:
            stack.crash(container)
    stack.finish(run)
