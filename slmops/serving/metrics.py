"""Prometheus metrics of one service, in a registry of its own. No label carries text of a client."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slmops.serving.fleet import Fleet
from slmops.serving.limits import Admission

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """What happened since the service started, and how it is at the moment of a scrape.

    The status of a request is what the client got, or would have got: 499 if it left, 502 and 504 if an answer broke
    off. Its endpoint is a path or "other"; its version is "" if none was asked.
    """

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self._fleet = fleet
        self._admission = admission
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, buckets=BUCKETS_S, registry=self._registry)
        self.requests = counter("slmops_requests", "Requests by outcome.", ["endpoint", "status", "version"])
        self.seconds = histogram(
            "slmops_request_seconds", "From the request's headers to the end of the answer.", ["endpoint"]
        )
        self.first_token = histogram(
            "slmops_first_token_seconds", "From the request's headers to the first token of a streamed answer."
        )
        counts = "as the runtime counts."
        self.prompt_tokens = counter("slmops_prompt_tokens", f"Tokens of the rendered conversations, {counts}")
        self.completion_tokens = counter("slmops_completion_tokens", f"Tokens of the answers, {counts}")
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        fleet = self._fleet
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        for kind, name, text, value in (
            (gauge, "slmops_in_flight", "Requests that are being answered.", self._admission.running),
            (gauge, "slmops_queued", "Requests that wait.", self._admission.waiting),
            (gauge, "slmops_ready", "1 if the champion answers.", fleet.ready),
            (gauge, "slmops_registry_up", "1 if the registry answered when it was last asked.", fleet.watch.reachable),
            (counter, "slmops_switches", "Changes to another version.", fleet.switches),
            (counter, "slmops_backend_restarts", "Runtime processes that died and were started again.", fleet.restarts),
        ):
            yield kind(name, text, value=int(value))
        memory = gauge("slmops_backend_memory_bytes", "Memory of each runtime process.", labels=["foundry_id"])
        total: defaultdict[str, float] = defaultdict(float)
        for one in fleet.running:
            total[one.installed.foundry_id] += one.memory_mb() * 1e6
        for foundry_id, size in total.items():
            memory.add_metric([foundry_id], size)
        yield memory
        served = gauge("slmops_model_info", "The version that answers.", labels=["model", "version", "variant"])
        if fleet.champion is not None:
            version = fleet.champion.installed
            served.add_metric([fleet.name, str(version.version), version.variant], 1)
        yield served
