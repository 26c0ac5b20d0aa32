"""What Prometheus is told of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("bitlm_requests", "HTTP requests that were answered", ["path", "status"], **own)
        self.disconnects = Counter("bitlm_disconnects", "HTTP requests whose client left before the end", **own)
        self.request_seconds = Histogram(
            "bitlm_request_seconds", "From a request to the end of its answer", ["path"], buckets=_SECONDS, **own
        )
        self.first_block_seconds = Histogram(
            "bitlm_first_block_seconds", "From a completion's arrival to its first block", buckets=_SECONDS, **own
        )
        self.block_seconds = Histogram(
            "bitlm_block_seconds", "One step of the engine: a block of every row", buckets=_SECONDS, **own
        )
        self.prompt_tokens = Counter("bitlm_prompt_tokens", "Tokens of the prompts taken in", **own)
        self.generated_tokens = Counter("bitlm_generated_tokens", "Tokens generated", **own)
        self.blocks = Counter("bitlm_blocks", "Blocks generated, counted a row", **own)
        self.failed_steps = Counter("bitlm_failed_steps", "Steps of the engine that raised", **own)
        self.queue_length = Gauge("bitlm_queue_length", "Completions that wait for a row of the batch", **own)
        self.batch_size = Gauge("bitlm_batch_size", "Completions decoded in the newest step", **own)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
