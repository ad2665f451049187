"""What is counted, under vLLM's names, so that dashboards made for it work."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from quantpage.engine import Engine, Piece, Request

_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of requests, and the engine's own, as one page of text."""

    def __init__(self, name: str, engine: Engine, bytes_saved_a_page: int) -> None:
        self._registry, label = CollectorRegistry(), ["model_name"]
        self._first = self._histogram("time_to_first_token_seconds", "Until the first text.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens.")
        self._whole = self._histogram("e2e_request_latency_seconds", "Until the answer ended.")
        self._asked = self._histogram("request_prompt_tokens", "Of a prompt.", _TOKENS)
        self._made = self._histogram("request_generation_tokens", "Of an answer.", _TOKENS)
        self._name, labels = name, [*label, "finished_reason"]
        self._ended = Counter(
            "vllm:request_success", "Answers that ended.", labels, registry=self._registry
        )
        self._registry.register(_EngineCollector(name, engine, bytes_saved_a_page))

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def watch(self, request: Request) -> "Watch":
        """Times one request from now on."""
        return Watch(self, request)

    def ended(self, reason: str) -> None:
        """Count an answer that ended."""
        self._ended.labels(self._name, {"cancelled": "abort"}.get(reason, reason)).inc()

    def observe(self, which: str, value: float) -> None:
        """Add one time to 'first', 'between' or 'whole', or one count to 'asked' or 'made'."""
        getattr(self, f"_{which}").labels(self._name).observe(value)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(
            f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
        )


class Watch:
    """The clock of one request's answers."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._last = [0.0] * request.answers
        self._prompt, self._running = len(request.prompt), request.answers

    def piece(self, piece: Piece) -> None:
        """News came."""
        now, last = time.perf_counter(), self._last[piece.answer]
        if piece.made:
            self._metrics.observe("between" if last else "first", now - (last or self._start))
            self._last[piece.answer] = now
        if piece.finish_reason is not None:
            self._metrics.ended(piece.finish_reason)
            self._metrics.observe("whole", now - self._start)
            self._metrics.observe("made", piece.made)
            self._running -= 1
            if not self._running:
                self._metrics.observe("asked", self._prompt)


class _EngineCollector:
    """Reads the engine when somebody asks."""

    def __init__(self, name: str, engine: Engine, bytes_saved_a_page: int) -> None:
        self._name, self._engine, self._saved = name, engine, bytes_saved_a_page

    def collect(self) -> Any:
        """The engine's counters as Prometheus' families."""
        now = self._engine.stats()
        gauges = {
            "vllm:num_requests_running": now.running,
            "vllm:num_requests_waiting": now.waiting,
            # As vLLM counts: what is remembered, and held by no answer, is free.
            "vllm:kv_cache_usage_perc": now.answer_pages / now.pages,
            "quantpage:pages": now.pages,
            "quantpage:pages_used": now.used_pages,
            "quantpage:pages_remembered": now.remembered_pages,
            "quantpage:bytes_saved": now.used_pages * self._saved,
        }
        counters = {
            "vllm:num_preemptions": now.preemptions,
            "vllm:prompt_tokens": now.prompt_tokens,
            "vllm:generation_tokens": now.made_tokens,
            "vllm:prefix_cache_queries": now.prompt_tokens,
            "vllm:prefix_cache_hits": now.cached_tokens,
            "quantpage:steps": now.steps,
        }
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                made = family(name, name.partition(":")[2].replace("_", " "), labels=["model_name"])
                made.add_metric([self._name], value)
                yield made
