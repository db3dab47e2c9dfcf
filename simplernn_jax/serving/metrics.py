"""Prometheus metrics of the server."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from simplernn_jax.serving.engine import Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and distributions, read by ``GET /metrics``."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "simplernn_requests", "Requests by path and status.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "simplernn_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.cached_tokens = Counter(
            "simplernn_cached_tokens", "Tokens of prompts found in the prefix cache.",
            registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "simplernn_time_to_first_token_seconds", "From submission to the first new token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "simplernn_inter_token_latency_seconds", "Time per new token after the first event.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        for name, text, read in (
            ("slots", "Slots.", lambda: engine.num_slots),
            ("slots_active", "Slots that decode.", lambda: engine.num_active),
            ("waiting", "Prompts that wait for a slot.", lambda: engine.num_waiting),
            ("new_tokens", "New tokens since the start.", lambda: engine.num_tokens),
            ("prefix_cache_bytes", "Bytes of the prefix cache.", lambda: engine.cache.num_bytes),
            ("prefix_cache_evicted", "States evicted from it.", lambda: engine.cache.num_evicted),
        ):
            Gauge(f"simplernn_{name}", text, registry=registry).set_function(read)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)


class Latency:
    """Time to the first token and between tokens of one continuation."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = time.perf_counter()
        self._has_started = False

    def observe(self, num_tokens: int) -> None:
        """Record new tokens."""
        if not num_tokens:
            return
        now = time.perf_counter()
        if self._has_started:
            self._metrics.between_tokens.observe((now - self._last) / num_tokens)
        else:
            self._metrics.first_token.observe(now - self._last)
        self._has_started = True
        self._last = now
