"""Prometheus metrics of one service, in a registry of its own.

No label carries text of a client: endpoints, statuses and versions are few.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slmops.serving.fleet import FleetState
from slmops.serving.limits import Admission

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """What happened since the service started, and how it is at the moment of a scrape.

    Args:
        state: How the fleet is, asked at each scrape.
        admission: Who runs and who waits.
    """

    def __init__(self, state: Callable[[], FleetState], admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "slmops_requests", "Requests by outcome.", ["endpoint", "status", "version"], registry=registry
        )
        self._seconds = Histogram(
            "slmops_request_seconds",
            "From the request's headers to the end of the answer.",
            ["endpoint"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._first = Histogram(
            "slmops_first_token_seconds",
            "From the request's headers to the first token of a streamed answer.",
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._prompt = Counter(
            "slmops_prompt_tokens", "Tokens of the rendered conversations, as the runtime counts.", registry=registry
        )
        self._completion = Counter(
            "slmops_completion_tokens", "Tokens of the answers, as the runtime counts.", registry=registry
        )
        registry.register(self)

    def request(self, endpoint: str, status: int, version: str, seconds: float) -> None:
        """Count one request.

        Args:
            endpoint: Its path, or "other".
            status: What the client got, or would have got: 499 if it left, 502 and 504 if an answer broke off.
            version: The version that answered, or "" if none was asked.
            seconds: What it took.
        """
        self._requests.labels(endpoint, str(status), version).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Note when the first token of a streamed answer came."""
        self._first.observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        """Add the tokens of one answer."""
        self._prompt.inc(prompt)
        self._completion.inc(completion)

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Empty: without this the registry would ask for a scrape when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What is true at the moment of the scrape."""
        state = self._state()
        for name, text, value in (
            ("slmops_in_flight", "Requests that are being answered.", self._admission.running),
            ("slmops_queued", "Requests that wait.", self._admission.waiting),
            ("slmops_ready", "1 if the champion answers.", int(state.ready)),
            ("slmops_registry_up", "1 if the registry answered when it was last asked.", int(state.registry == "ok")),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("slmops_switches", "Changes to another version.", value=state.switches)
        yield CounterMetricFamily(
            "slmops_backend_restarts", "Runtime processes that died and were started again.", value=state.restarts
        )
        memory = GaugeMetricFamily(
            "slmops_backend_memory_bytes", "Memory of each runtime process.", labels=["foundry_id"]
        )
        total: defaultdict[str, float] = defaultdict(float)
        for loaded in state.loaded:  # while a process is replaced there may be two of its version
            total[loaded.foundry_id] += loaded.memory_mb * 1e6
        for foundry_id, size in total.items():
            memory.add_metric([foundry_id], size)
        yield memory
        served = GaugeMetricFamily(
            "slmops_model_info", "The version that answers.", labels=["model", "version", "variant"]
        )
        if state.version is not None:
            served.add_metric([state.model, str(state.version), state.variant or ""], 1)
        yield served
