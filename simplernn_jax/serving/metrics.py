"""Prometheus metrics of the server."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from simplernn_jax.serving.responses import ChoiceText
from simplernn_jax.serving.worker import Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and distributions, read by ``GET /metrics``."""

    def __init__(self, worker: Worker) -> None:
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
            ("slots", "Slots.", lambda: worker.num_slots),
            ("slots_active", "Slots that decode.", lambda: worker.num_active),
            ("waiting", "Prompts that wait for a slot.", lambda: worker.num_waiting),
            ("new_tokens", "New tokens since the start.", lambda: worker.num_tokens),
            ("prefix_cache_bytes", "Bytes of the prefix cache.", lambda: worker.cache.num_bytes),
            ("prefix_cache_evicted", "States evicted from it.", lambda: worker.cache.num_evicted),
        ):
            Gauge(f"simplernn_{name}", text, registry=registry).set_function(read)

    def observe(self, choice: ChoiceText, num_tokens: int) -> None:
        """Record new tokens of a continuation, before it gets them."""
        if not num_tokens:
            return
        now = time.perf_counter()
        if choice.num_tokens:
            self.between_tokens.observe((now - choice.last_seconds) / num_tokens)
        else:
            self.first_token.observe(now - choice.last_seconds)
        choice.last_seconds = now

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
