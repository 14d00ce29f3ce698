"""The watch over a new champion: does its service switch to it, and does it answer as well as it was measured?"""

import time
from collections.abc import Callable
from pathlib import Path

import httpx
from pydantic import Field

from slmops.core.errors import ServingError
from slmops.core.settings import Settings
from slmops.core.values import Frozen, Measurement
from slmops.evaluation import dataset, matchers, scoring, statistics
from slmops.foundry.versions import ModelVersion
from slmops.serving.backend import CHAT

SWITCH_S = 300.0  # for a service to fetch, load and try a version
REQUEST_S = 120.0
FAILURES = 3  # so many failed requests in a row end the watch; so many of other clients count against it
VERSION_HEADER = "x-slmops-version"


class Probation(Frozen):
    """How a version did while it was watched."""

    held: bool = Field(description="Nothing speaks against it.")
    detail: str = Field(description="A sentence for people.")
    requests: int
    failed: int
    accuracy: Measurement | None = Field(None, description="Of the questions that were asked meanwhile.")


def await_switch(url: str, version: ModelVersion, champion: Callable[[], ModelVersion | None]) -> int:
    """Wait until the service at ``url`` serves a version that was promoted; ``champion`` asks the registry for it.

    Returns the number that it serves, which may be that of another version of the release. A ServingError says that it
    refused the version, serves something else, or does not get there in time.
    """
    deadline = time.monotonic() + SWITCH_S
    said, others = "it does not answer", list[str]()
    while time.monotonic() < deadline:
        try:
            served = httpx.get(f"{url}/health", timeout=10, trust_env=False).json().get("version")
            if served is not None and str(served) in (str(version.version), *others):
                return int(served)
            said = f"it serves version {served}"
        except (httpx.HTTPError, ValueError) as error:
            said = f"it does not answer: {error}"
        wanted = champion()
        if wanted is None or wanted.version != version.version:
            now = f"{wanted.label} is the champion" if wanted else "there is no champion any more"
            raise ServingError(f"{version.label} was withdrawn by its service: {now}.", "Its log says what failed.")
        others = wanted.others
        time.sleep(1)
    raise ServingError(f"The service at {url} did not switch to {version.label} within {SWITCH_S:.0f} s: {said}.")


def watch(
    url: str,
    version: ModelVersion,
    questions: Path,
    matcher: str | None,
    measured: Measurement | None,
    seconds: float,
    settings: Settings,
) -> Probation:
    """Ask the evaluation set through the service, spread over the time, and look at what other clients get.

    It fails if several requests in a row fail, if more than a twentieth do, if another version answers, or if the
    whole 95 % interval of the accuracy lies below ``measured``, the version's accuracy in its evaluation.
    """
    items = dataset.load(questions, matcher=matcher, judge=settings.judge_configured).items
    function = matchers.load_function(matcher) if matcher else None
    token = settings.serve_token
    headers = {"authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    right: list[bool] = []
    failures: list[str] = []
    in_a_row = 0
    with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_S, trust_env=False) as client:
        before = _broken(client, version)
        begun = time.monotonic()
        for number, item in enumerate(items):
            time.sleep(max(0.0, begun + number * seconds / len(items) - time.monotonic()))
            if time.monotonic() - begun > seconds:
                break
            answer, problem = _ask(client, version, item)
            if problem:
                failures.append(problem)
            elif (correct := scoring.judgement(item, answer, function, settings).correct) is not None:
                right.append(correct)
            in_a_row = in_a_row + 1 if problem else 0
            if in_a_row >= FAILURES:
                break
        else:
            time.sleep(max(0.0, begun + seconds - time.monotonic()))
        broken = _broken(client, version) - before - len(failures)
    asked = len(right) + len(failures)
    accuracy = statistics.of_proportion(sum(right), len(right)) if right else None
    against = None
    if len(failures) >= FAILURES or len(failures) > asked / 20:
        against = f"requests fail: {failures[-1]}"
    elif broken >= FAILURES:
        against = f"{broken} requests of other clients failed"
    elif accuracy and measured and accuracy.high is not None and accuracy.high < measured.value:
        against = f"its answers are worse than measured (95 % interval up to {accuracy.high:.2f})"
    said = f"{asked} questions in {time.monotonic() - begun:.0f} s, {len(failures)} failed"
    if accuracy is not None:
        said += f", accuracy {accuracy.value:.2f}"
        said += f" where {measured.value:.2f} was measured" if measured else ""
    detail = f"{version.label}: {said}{f'; {against}' if against else ''}."
    return Probation(held=not against, detail=detail, requests=asked, failed=len(failures), accuracy=accuracy)


def _ask(client: httpx.Client, version: ModelVersion, item: dataset.Item) -> tuple[str, str | None]:
    """The answer, or what went wrong; a service that is busy is asked again."""
    body = {"model": version.name, "temperature": 0, **item.request}
    try:
        for pause in (0, 0.5, 2.0, 5.0):
            time.sleep(pause)
            reply = client.post(CHAT, json=body)
            if reply.status_code not in (429, 503):
                break
        if reply.status_code == 422:  # a tool call that is not complete: a wrong answer of the model
            return "", None
        if reply.status_code != 200:
            return "", f"status {reply.status_code}: {reply.text[:200]}"
        if reply.headers.get(VERSION_HEADER) != str(version.version):
            return "", f"version {reply.headers.get(VERSION_HEADER)} answered"
        message = reply.json()["choices"][0]["message"]
        calls = [one["function"] for one in message.get("tool_calls") or ()]
        return matchers.as_answer(calls) if calls else str(message.get("content") or ""), None
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        return "", f"{type(error).__name__}: {error}"


def _broken(client: httpx.Client, version: ModelVersion) -> int:
    """Requests to this version that the service has answered with an error of its own so far."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    except (httpx.HTTPError, ValueError):
        return 0
    counts = [one for family in families for one in family.samples if one.name == "slmops_requests_total"]
    mine = [one for one in counts if one.labels["version"] == str(version.version)]
    return sum(int(one.value) for one in mine if one.labels["status"].startswith("5"))
