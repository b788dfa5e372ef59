"""What Prometheus reads: counters and times of requests, and the figures of the service at the moment of asking.

docs/serving.md lists the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrid_k2.engine.reply import Reply
from hybrid_k2.engine.service_types import ServiceStats
from hybrid_k2.server.backend import Backend
from hybrid_k2.server.errors import ApiError

PREFIX = "hybrid_k2_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {  # of ServiceStats
    "running": ("num_requests_running", "Requests that are being computed."),
    "waiting": ("num_requests_waiting", "Requests in the queue."),
    "kv_pages_used": ("kv_cache_pages_used", "Pages of the latent cache in use."),
    "kv_pages_kept": ("kv_cache_pages_kept", "Pages of the latent cache kept for prompts that may come again."),
    "ram_pages_kept": ("ram_cache_pages_kept", "Pages kept in host memory for prompts that may come again."),
    "kv_pages_total": ("kv_cache_pages", "Pages of the latent cache."),
}
_COUNTERS = {
    "prefix_queries_tokens": ("prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of all requests."),
    "generated_tokens": ("generation_tokens", "Tokens generated."),
    "preemptions": ("num_preemptions", "Requests that gave up their pages to others."),
    "steps": ("engine_steps", "Steps of the engine."),
    "failed_steps": ("engine_failed_steps", "Steps of the engine in which a request failed."),
}


class Metrics:
    """Count the requests of one server. Any thread may call."""

    def __init__(self, backend: Backend) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(backend))
        self._responses = self._counter("http_responses", "Responses, by route and status.", ("route", "status"))
        self._refusals = self._counter("admission_rejections", "Requests refused for a full queue.", ("reason",))
        self._images = self._counter("images", "Images that were read.", ())
        self._ends = self._counter("request_success", "Choices that ended, by finish reason.", ("finished_reason",))
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first piece of a reply.")
        self._next = self._histogram("inter_token_latency_seconds", "Between two pieces of a reply.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end of a choice.")
        self._prefill = self._histogram("request_prefill_time_seconds", "Computing of the prompt.")
        self._decode = self._histogram("request_decode_time_seconds", "Computing of the reply.")

    def response(self, route: str, status: int) -> None:
        """Count one response; `route` is a pattern, not a path, so that clients cannot make up labels."""
        self._responses.labels(route, str(status)).inc()

    def refused(self, error: ApiError) -> None:
        """Count a request that the queue did not take."""
        if error.status in (429, 503):
            self._refusals.labels(error.code or "other").inc()

    def image(self) -> None:
        """Count an image that was decoded for a request."""
        self._images.inc()

    def piece(self, seconds: float, *, first: bool) -> None:
        """Take the time to a piece of a reply, from the request's arrival or from the piece before."""
        (self._first if first else self._next).observe(seconds)

    def finished(self, reply: Reply, seconds: float) -> None:
        """Take a finished choice, and the time since the request arrived."""
        self._ends.labels(reply.finish_reason).inc()
        self._whole.observe(seconds)
        self._prefill.observe(reply.timings.prefill_s)
        self._decode.observe(reply.timings.decode_s)

    def text(self) -> bytes:
        """Return all figures in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=_SECONDS, registry=self._registry)


class _ServiceCollector(Collector):
    """Ask the service when Prometheus asks."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known when they are collected."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of this moment."""
        read, total = self._backend.loading_progress
        yield _gauge("ready", "1 when requests are taken.", float(self._backend.state == "ready"))
        yield _gauge("loading_read_bytes", "Weights read so far, in bytes.", read)
        yield _gauge("loading_bytes", "Weights to read, in bytes; 0 before that is known.", total)
        served = self._backend.served
        if served is not None:
            yield from _service_metrics(served.service.stats())


def _service_metrics(stats: ServiceStats) -> Iterator[Metric]:
    for field, (name, text) in _GAUGES.items():
        yield _gauge(name, text, getattr(stats, field))
    share = stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
    yield _gauge("kv_cache_usage_ratio", "Share of the latent cache in use, 0 to 1.", share)
    for field, (name, text) in _COUNTERS.items():
        metric = CounterMetricFamily(PREFIX + name, text)
        metric.add_metric([], getattr(stats, field))
        yield metric


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)
