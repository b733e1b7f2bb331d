"""What Prometheus reads: the engine's counters, and what the server timed itself. Every server has its own registry."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from labkit.serving.options import StreamingEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
OUTCOMES = ("completed", "cancelled", "refused", "failed")
"""completed: answered whole. cancelled: the client went away or did not read. refused: a 4xx, or a 503 while loading.
failed: the engine or the server broke."""


class Distribution(Collector):
    """A histogram of seconds, for one thread. The client library's takes ten times as long for an observation, which
    counts where there is one for every token."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        bounds = [*(floatToGoString(each) for each in SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """Counters and histograms of one server; called from the event loop only."""

    def __init__(self, engine: StreamingEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.ttft = Distribution(
            "labkit_time_to_first_token_seconds", "From the request's last byte to its first token."
        )
        self.itl = Distribution(
            "labkit_inter_token_latency_seconds", "Between two pieces of an answer, each one token or more."
        )
        self.e2e = Distribution(
            "labkit_request_duration_seconds",
            "From the request's last byte to the answer's last token; completed requests.",
        )
        for distribution in (self.ttft, self.itl, self.e2e):
            self.registry.register(distribution)
        self._outcomes = Counter(
            "labkit_requests", "Requests for completions by outcome.", ["outcome"], registry=self.registry
        )
        self._failures = Counter(
            "labkit_failures", "Requests not answered whole, by kind.", ["kind"], registry=self.registry
        )
        for outcome in OUTCOMES:  # so that a rate can be computed from the first scrape on
            self._outcomes.labels(outcome)

    def completed(self, seconds: float) -> None:
        self._outcomes.labels("completed").inc()
        self.e2e.observe(seconds)

    def ended(self, outcome: str, kind: str) -> None:
        """``kind`` is one of a fixed few: a label never holds what a client sent."""
        self._outcomes.labels(outcome).inc()
        self._failures.labels(kind).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """One reading of the engine for each scrape, so that its numbers belong together."""

    def __init__(self, engine: StreamingEngine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield GaugeMetricFamily("labkit_requests_waiting", "Requests in the queue.", stats.waiting)
        yield GaugeMetricFamily("labkit_requests_running", "Requests in the running batch.", stats.running)
        yield GaugeMetricFamily("labkit_kv_blocks_used", "KV blocks in use.", stats.kv_blocks_used)
        yield GaugeMetricFamily("labkit_kv_blocks", "KV blocks in all.", stats.kv_blocks_total)
        yield GaugeMetricFamily("labkit_kv_use_ratio", "Fraction of the KV blocks in use, 0 to 1.", stats.kv_use)
        yield CounterMetricFamily("labkit_engine_steps", "Engine steps.", stats.steps)
        yield CounterMetricFamily("labkit_prompt_tokens", "Prompt tokens of the requests taken.", stats.prompt_tokens)
        yield CounterMetricFamily("labkit_generated_tokens", "Tokens generated.", stats.generated_tokens)
        yield CounterMetricFamily("labkit_preemptions", "Requests put back for want of KV blocks.", stats.preemptions)
        yield CounterMetricFamily(
            "labkit_prefix_cache_tokens", "Tokens that the prefix cache had.", stats.cached_tokens
        )
        yield CounterMetricFamily("labkit_engine_busy_seconds", "Time spent in engine steps.", stats.busy_s)
