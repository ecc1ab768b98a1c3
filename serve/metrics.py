"""Figures of a running server, in the text form that Prometheus reads.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

__all__ = ["CONTENT_TYPE", "Metrics"]


class Metrics:
    """All figures, in a registry of their own.

    Args:
        running, waiting, adapters: functions that say how many there are now.
    """

    def __init__(
        self,
        running: Callable[[], float],
        waiting: Callable[[], float],
        adapters: Callable[[], float],
    ) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "olivepress_requests", "Requests by model and HTTP status.", ["model", "status"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "olivepress_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry
        )
        self.generated_tokens = Counter(
            "olivepress_generated_tokens", "Tokens of answers.", ["model"], registry=registry
        )
        self.first_token = Histogram(
            "olivepress_time_to_first_token_seconds", "From the request to its first token.",
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self.duration = Histogram(
            "olivepress_request_seconds", "From the request to its end.",
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        for name, about, function in (
            ("olivepress_sequences_running", "Answers being written.", running),
            ("olivepress_sequences_waiting", "Answers that wait for a slot.", waiting),
            ("olivepress_adapters_loaded", "Adapters in memory.", adapters),
        ):
            Gauge(name, about, registry=registry).set_function(function)

    def text(self) -> bytes:
        return generate_latest(self._registry)
