"""A server's metrics, for Prometheus, under vLLM's names and labels.

Owns: the series and their buckets. What is counted by the core (tokens, blocks, the queue) is read from its statistics
at each scrape; what has a distribution is observed as it happens. Nothing is global: each server has its registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quire.config.schema import Config
from quire.types.outputs import RequestMetrics
from quire.types.params import SamplingParams
from quire.types.pooling import PoolingParams
from quire.types.request import Request
from quire.types.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
LATENCY = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REASONS = ("stop", "length", "abort", "error")


def tokens_upto(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    out: list[int] = []
    scale = 1
    while scale <= most:
        out += [v for k in (1, 2, 5) if (v := k * scale) <= most]
        scale *= 10
    return out


class Latency(NamedTuple):
    """A distribution of seconds: `counts[i]` observations are at most `bounds[i]` and above the bound before; the last
    count is of those above all bounds. `sum`: of all observations."""

    bounds: list[float]
    counts: list[int]
    sum: float


class Metrics:
    """One engine's series. `watch` names where statistics come from."""

    def __init__(self, model: str, config: Config) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._names = ("model_name", "engine")
        self._values = (model, "0")
        self._source: Callable[[], EngineStats] | None = None
        self._steps: Callable[[], list[int]] = list
        most = tokens_upto(config.model.max_model_len)
        h = self._histogram
        self._ttft = h("time_to_first_token_seconds", "Time to first token in seconds.", TTFT)
        self._gap = h("inter_token_latency_seconds", "Time between two tokens of a stream in seconds.", GAP)
        self._mean_gap = h("request_time_per_output_token_seconds", "A request's mean time per output token.", GAP)
        self._e2e = h("e2e_request_latency_seconds", "Time from arrival to the last token in seconds.", LATENCY)
        self._queue = h("request_queue_time_seconds", "Time in the queue in seconds.", LATENCY)
        self._prefill = h("request_prefill_time_seconds", "Time from the first step to the first token.", LATENCY)
        self._decode = h("request_decode_time_seconds", "Time from the first to the last token.", LATENCY)
        self._inference = h("request_inference_time_seconds", "Time from the first step to the last token.", LATENCY)
        self._prompt = h("request_prompt_tokens", "Prompt tokens of a request.", most)
        self._generation = h("request_generation_tokens", "Generated tokens of a request.", most)
        self._longest = h("request_max_num_generation_tokens", "The most tokens of a request's samples.", most)
        self._computed = h("request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", most)
        self._n = h("request_params_n", "The parameter n of requests.", (1, 2, 5, 10, 20))
        self._max_tokens = h("request_params_max_tokens", "The parameter max_tokens of requests.", most)
        self._preempted = h("request_num_preemptions", "How often a request was preempted.", (0, 1, 2, 5, 10, 20, 50))
        self._iteration = h("iteration_tokens_total", "Tokens of a step.", STEP)
        success = Counter(
            "vllm:request_success", "Requests that ended.", [*self._names, "finished_reason"], registry=self.registry
        )
        self._success = {reason: success.labels(*self._values, reason) for reason in REASONS}
        self._cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens found in the cache.")
        self._received = self._counter("quire:requests_received", "Requests given to the engine.")
        self._rejected = Counter(
            "vllm:admission_rejections", "Requests turned away.", ["model_name", "reason"], registry=self.registry
        )
        self._http = Counter("http_requests", "HTTP requests.", ["method", "handler", "status"], registry=self.registry)
        self._start = Gauge("quire:startup_seconds", "Parts of the start.", ["phase"], registry=self.registry)
        self._restarts = Gauge("quire:engine_restarts", "Engine processes that were lost.", registry=self.registry)
        cache = config.cache
        self._info = {
            "block_size": str(cache.block_size),
            "cache_dtype": cache.kv_cache_dtype,
            "enable_prefix_caching": str(cache.enable_prefix_caching),
            "gpu_memory_utilization": str(cache.gpu_memory_utilization),
            "swap_space": str(cache.swap_space),
        }
        self.registry.register(self)  # type: ignore[arg-type]

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Any:
        made = Histogram(f"vllm:{name}", text, self._names, buckets=buckets, registry=self.registry)
        return made.labels(*self._values)

    def _counter(self, name: str, text: str) -> Any:
        return Counter(name, text, self._names, registry=self.registry).labels(*self._values)

    def watch(self, stats: Callable[[], EngineStats], steps: Callable[[], list[int]]) -> None:
        """`stats`: the statistics now; `steps`: how many tokens each step computed since the last call."""
        self._source, self._steps = stats, steps

    # -- what happens ------------------------------------------------------------------------------------------------

    def received(self) -> None:
        self._received.inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._values[0], reason).inc()

    def answered(self, method: str, handler: str, status: int) -> None:
        self._http.labels(method, handler, str(status)).inc()

    def started(self, seconds: dict[str, float]) -> None:
        for phase, value in seconds.items():
            self._start.labels(phase).set(value)

    def restarts(self, count: int) -> None:
        self._restarts.set(count)

    def between(self, seconds: float, tokens: int) -> None:
        self._gap.observe(seconds / tokens)

    def ended(self, request: Request, metrics: RequestMetrics, reasons: list[str], cached: int | None) -> None:
        params = request.params
        self._success[worst(reasons)].inc()
        prompt, made = len(request.prompt_token_ids), metrics.num_generation_tokens
        self._prompt.observe(prompt)
        self._computed.observe(prompt - (cached or 0))
        self._cached.inc(cached or 0)
        n = 1
        if not isinstance(params, PoolingParams):
            n = params.n if isinstance(params, SamplingParams) else params.beam_width
            self._generation.observe(made)
            self._longest.observe(-(-made // n))
            self._n.observe(n)
            self._max_tokens.observe(params.max_tokens or 0)
        self._preempted.observe(metrics.num_preemptions)
        end = metrics.finished_time or metrics.arrival_time
        self._e2e.observe(end - metrics.arrival_time)
        planned, first = metrics.scheduled_time, metrics.first_token_time
        if planned is not None:
            self._queue.observe(max(0.0, planned - metrics.arrival_time))
            self._inference.observe(max(0.0, end - planned))
        if first is not None:
            self._ttft.observe(max(0.0, first - metrics.arrival_time))
            self._decode.observe(max(0.0, end - first))
            if made > n:
                self._mean_gap.observe(max(0.0, end - first) / (-(-made // n) - 1))
            if planned is not None:
                self._prefill.observe(max(0.0, first - planned))

    def latencies(self) -> dict[str, Latency]:
        """The distributions of a request's times so far, by name."""
        named = {"ttft": self._ttft, "inter_token": self._gap, "e2e": self._e2e, "queue": self._queue}
        return {name: _latency(histogram) for name, histogram in named.items()}

    # -- what is scraped ---------------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """All series as text."""
        for tokens in self._steps():
            self._iteration.observe(tokens)
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        """Called by the registry: what comes from the core's statistics."""
        if self._source is None:
            return
        s = self._source()
        gauges: list[tuple[str, str, float]] = [
            ("vllm:num_requests_running", "Sequences that are being computed.", s.running),
            ("vllm:num_requests_waiting", "Sequences that wait.", s.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", s.kv_cache_usage),
            ("vllm:gpu_cache_usage_perc", "Retired: see kv_cache_usage_perc.", s.kv_cache_usage),
            ("vllm:gpu_prefix_cache_hit_rate", "Retired: hits by queries.", s.prefix_hit_rate),
            ("quire:kv_blocks_total", "KV blocks.", s.blocks_total),
            ("quire:kv_blocks_used", "KV blocks in use.", s.blocks_used),
            ("quire:kv_blocks_cached", "KV blocks that hold a prefix and are not in use.", s.blocks_cached),
            ("quire:kv_blocks_free", "KV blocks that hold nothing.", s.blocks_free),
        ]
        counters: list[tuple[str, str, float]] = [
            ("vllm:prompt_tokens", "Prompt tokens.", s.prompt_tokens),
            ("vllm:generation_tokens", "Generated tokens.", s.generation_tokens),
            ("vllm:num_preemptions", "Preemptions.", s.preemptions),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", s.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", s.prefix_hits),
            ("vllm:gpu_prefix_cache_queries", "Retired: see prefix_cache_queries.", s.prefix_queries),
            ("vllm:gpu_prefix_cache_hits", "Retired: see prefix_cache_hits.", s.prefix_hits),
        ]
        for name, text, value in gauges:
            yield self._one(GaugeMetricFamily, name, text, value)
        for name, text, value in counters:
            yield self._one(CounterMetricFamily, name, text, value)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Sequences that wait, by reason.", labels=[*self._names, "reason"]
        )
        waiting.add_metric([*self._values, "capacity"], s.waiting - s.deferred)
        waiting.add_metric([*self._values, "deferred"], s.deferred)
        yield waiting
        source = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where they came from.", labels=[*self._names, "source"]
        )
        source.add_metric([*self._values, "local_cache_hit"], s.prefix_hits)
        source.add_metric([*self._values, "local_compute"], max(0, s.prompt_tokens - s.prefix_hits))
        yield source
        info = {**self._info, "engine": "0", "num_gpu_blocks": str(s.blocks_total), "model_name": self._values[0]}
        info["num_cpu_blocks"] = str(s.host_blocks_total)
        made = GaugeMetricFamily("vllm:cache_config_info", "The cache's configuration.", labels=list(info))
        made.add_metric(list(info.values()), 1)
        yield made

    def _one(self, family: Any, name: str, text: str, value: float) -> Metric:
        made = family(name, text, labels=self._names)
        made.add_metric(self._values, value)
        return made


def worst(reasons: Sequence[str]) -> str:
    """Of a request's sequences, the end that tells most."""
    return max(reasons, key=REASONS.index, default="abort")


def _latency(histogram: Any) -> Latency:
    (family,) = histogram.collect()
    upto = [(s.labels["le"], int(s.value)) for s in family.samples if s.name.endswith("_bucket")]
    counts = [count - before for (_, count), (_, before) in zip(upto, [("", 0), *upto[:-1]], strict=True)]
    total = next(s.value for s in family.samples if s.name.endswith("_sum"))
    return Latency([float(bound) for bound, _ in upto[:-1]], counts, total)
