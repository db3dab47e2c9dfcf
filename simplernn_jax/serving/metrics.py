"""Prometheus metrics of the server."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from simplernn_jax.serving.worker import Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and distributions, read by ``GET /metrics``."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        counter = functools.partial(Counter, namespace="simplernn", registry=self._registry)
        histogram = functools.partial(
            Histogram, namespace="simplernn", registry=self._registry, buckets=_SECONDS
        )
        self.requests = counter("requests", "Requests by path and status.", ["path", "status"])
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter(
            "cached_tokens", "Tokens of prompts found in the prefix cache."
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From submission to the first new token."
        )
        self._between_tokens = histogram(
            "inter_token_latency_seconds", "Time per new token after the first event."
        )
        for name, text, read in (
            ("slots", "Slots.", lambda: worker.num_slots),
            ("slots_active", "Slots that decode.", lambda: worker.num_active),
            ("waiting", "Prompts that wait for a slot.", lambda: worker.num_waiting),
            ("new_tokens", "New tokens since the start.", lambda: worker.num_tokens),
            ("prefix_cache_bytes", "Its size.", lambda: worker.scheduler.cache.num_bytes),
            ("prefix_cache_evicted", "States.", lambda: worker.scheduler.cache.num_evicted),
        ):
            gauge = Gauge(name, text, namespace="simplernn", registry=self._registry)
            gauge.set_function(read)

    def observe(self, num_before: int, num_new: int, seconds: float) -> None:
        """Record new tokens of a continuation, `seconds` after its last ones or its submission."""
        if num_before and num_new:
            self._between_tokens.observe(seconds / num_new)
        elif num_new:
            self._first_token.observe(seconds)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self._registry)
