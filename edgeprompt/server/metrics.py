"""What `/metrics` shows, for Prometheus. Names end as its conventions ask: seconds, bytes, total."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from edgeprompt.request import RuntimeStatus

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one server."""

    def __init__(self, status: Callable[[], RuntimeStatus]) -> None:
        """`status`: asked whenever the metrics are read."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "edgeprompt_requests", "Answered requests.", ["endpoint", "model", "status"], registry=self._registry
        )
        self.tokens = Counter(
            "edgeprompt_tokens", "Tokens that were read (input) and generated (output).", ["kind"],
            registry=self._registry,
        )  # fmt: skip
        self.latency = Histogram(
            "edgeprompt_request_seconds", "From the request to the end of its answer.", ["endpoint"],
            buckets=LATENCIES, registry=self._registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "edgeprompt_time_to_first_token_seconds", "Of generations, waiting included.", buckets=LATENCIES,
            registry=self._registry,
        )  # fmt: skip
        self.streams = Gauge("edgeprompt_streams", "Streams that are open.", registry=self._registry)
        self.cancelled = Counter(
            "edgeprompt_cancelled", "Requests whose client went away before the answer.", registry=self._registry
        )
        self._registry.register(_Status(status))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return bytes(generate_latest(self._registry))


class _Status:
    def __init__(self, status: Callable[[], RuntimeStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        found = self._status()
        for name, text, value in (
            ("edgeprompt_queue_requests", "Requests that wait.", found.waiting),
            ("edgeprompt_running_requests", "Requests that are computed.", found.running),
            ("edgeprompt_resident_prefixes", "What is kept of prompts, in entries.", found.resident_prefixes),
            ("edgeprompt_resident_prefix_bytes", "What is kept of prompts, in bytes.", found.resident_bytes),
        ):
            yield GaugeMetricFamily(name, text, value=value)
