"""Prometheus metrics: vLLM's names with the prefix ``kubeinfer:``, all labelled with ``model_name``.

Observing is a bisection and an addition; families are put together only when they are scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kubeinfer.engine.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
         80.0, 160.0, 640.0)  # fmt: skip
_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
          10.0, 40.0)  # fmt: skip
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
            240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_N = (1, 2, 5, 10, 20)

FINISH_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Counts observations in buckets; ``buckets`` are upper bounds."""

    __slots__ = ("buckets", "counts", "help", "name", "sum")

    def __init__(self, name: str, help_text: str, buckets: Sequence[float]):
        self.name = name
        self.help = help_text
        self.buckets = list(buckets)
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.buckets, value)] += times
        self.sum += value * times

    def family(self, model_name: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.help, labels=["model_name"])
        total = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip([*map(float, self.buckets), float("inf")], self.counts):
            total += count
            rows.append(("+Inf" if bound == float("inf") else repr(bound), total))
        family.add_metric([model_name], rows, self.sum)
        return family


class Metrics(Collector):
    """All of a server's metrics. ``stats`` gives the engine's latest state."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self.model_name = model_name
        self._stats = stats
        prefix = "kubeinfer:"
        self.time_to_first_token = Histogram(
            prefix + "time_to_first_token_seconds", "Time from arrival to the first token.", _TTFT
        )
        self.inter_token_latency = Histogram(
            prefix + "inter_token_latency_seconds", "Time between two tokens of a request.", _TOKEN
        )
        self.time_per_output_token = Histogram(
            prefix + "request_time_per_output_token_seconds",
            "Mean time a token after the first, a request.",
            _TOKEN,
        )
        self.e2e_latency = Histogram(
            prefix + "e2e_request_latency_seconds", "Time from arrival to the last token.", _REQUEST
        )
        self.queue_time = Histogram(
            prefix + "request_queue_time_seconds", "Time from arrival until the request first ran.", _REQUEST
        )
        self.prefill_time = Histogram(
            prefix + "request_prefill_time_seconds", "Time from first run to the first token.", _REQUEST
        )
        self.decode_time = Histogram(
            prefix + "request_decode_time_seconds", "Time from the first token to the last.", _REQUEST
        )
        self.inference_time = Histogram(
            prefix + "request_inference_time_seconds", "Time from first run to the last token.", _REQUEST
        )
        self.prompt_length = Histogram(prefix + "request_prompt_tokens", "Prompt tokens a request.", _TOKENS)
        self.generation_length = Histogram(
            prefix + "request_generation_tokens", "Generated tokens a request.", _TOKENS
        )
        self.params_n = Histogram(prefix + "request_params_n", "Outputs asked for a request.", _N)
        self._histograms = [value for value in vars(self).values() if isinstance(value, Histogram)]
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def render(self) -> bytes:
        """The text a scrape gets."""
        return generate_latest(self.registry)

    def observe_request(
        self,
        *,
        prompt_tokens: int,
        generation_tokens: int,
        arrival: float,
        scheduled: float,
        first_token: float,
        finished: float,
        n: int = 1,
    ) -> None:
        """Count one finished request. Times are of one clock, in seconds; 0 for what never came."""
        self.e2e_latency.observe(max(finished - arrival, 0.0))
        self.prompt_length.observe(prompt_tokens)
        self.generation_length.observe(generation_tokens)
        self.params_n.observe(n)
        if scheduled:
            self.queue_time.observe(max(scheduled - arrival, 0.0))
            self.inference_time.observe(max(finished - scheduled, 0.0))
            if first_token:
                self.prefill_time.observe(max(first_token - scheduled, 0.0))
        if first_token:
            self.time_to_first_token.observe(max(first_token - arrival, 0.0))
            decode = max(finished - first_token, 0.0)
            self.decode_time.observe(decode)
            if generation_tokens > 1:
                self.time_per_output_token.observe(decode / (generation_tokens - 1))

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        labels = [self.model_name]

        def gauge(name: str, help_text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"kubeinfer:{name}", help_text, labels=["model_name"])
            family.add_metric(labels, value)
            return family

        def counter(name: str, help_text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"kubeinfer:{name}", help_text, labels=["model_name"])
            family.add_metric(labels, value)
            return family

        yield gauge("num_requests_running", "Requests that run.", stats.num_running)
        yield gauge("num_requests_waiting", "Requests that wait to run.", stats.num_waiting)
        yield gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", stats.kv_cache_usage)
        yield counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries
        )
        yield counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits
        )
        yield counter(
            "prefix_cache_host_hits",
            "Prompt tokens found in the prefix cache's host memory.",
            stats.prefix_cache_host_hits,
        )
        yield gauge(
            "host_cache_usage_perc",
            "Share of the host memory for KV blocks in use, 0 to 1.",
            stats.host_cache_usage,
        )
        yield counter(
            "kv_blocks_copied_out", "Evicted KV blocks copied to host memory.", stats.blocks_copied_out
        )
        yield counter(
            "num_preemptions", "Requests put back to wait for lack of KV cache.", stats.num_preemptions
        )
        yield counter("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield counter("engine_steps", "Forward passes of the engine.", stats.num_steps)
        success = CounterMetricFamily(
            "kubeinfer:request_success", "Finished requests.", labels=["model_name", "finished_reason"]
        )
        for reason, count in self.finished.items():
            success.add_metric([self.model_name, reason], count)
        yield success
        for histogram in self._histograms:
            yield histogram.family(self.model_name)
