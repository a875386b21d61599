"""What the server counts, in Prometheus' words; `/metrics` shows it.

A registry of its own, so that two servers in one process count apart.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hf_tiered_cache.observe.metrics import CacheStats
from hf_tiered_cache.serving.requests import Request

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Instruments:
    """Counters and histograms of one server; times in seconds."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Gauge(
            "htc_requests", "Requests that are there.", ["state"], registry=registry
        )
        self.ended = Counter(
            "htc_requests_ended", "Requests by how they ended.", ["outcome"], registry=registry
        )
        self.rejected = Counter(
            "htc_rejected", "Requests that were not let in.", ["reason"], registry=registry
        )
        self.prompt_tokens = Counter(
            "htc_prompt_tokens",
            "Prompt tokens, by where they came from.",
            ["source"],
            registry=registry,
        )
        self.generated_tokens = Counter(
            "htc_generated_tokens", "Tokens that came out.", registry=registry
        )
        self.preempted = Counter(
            "htc_preempted", "Requests that gave their memory back for a while.", registry=registry
        )
        self.parked = Gauge("htc_parked_conversations", "Parked caches.", registry=registry)
        self.queue = self._seconds("queue", "From the arrival to the model.")
        self.lookup = self._seconds("lookup", "Finding and forking a parked cache.")
        self.prefill = self._seconds("prefill_chunk", "A forward with several tokens.")
        self.decode = self._seconds("decode_step", "A forward with one token.")
        self.ttft = self._seconds("ttft", "From the arrival to the first token.")
        self.itl = self._seconds("itl", "From one token to the next.")

        self.flops = Counter(
            "htc_model_flops", "Operations of the model's forwards.", registry=registry
        )
        self.peak_flops = Gauge(
            "htc_peak_flops", "Operations per second of a matrix product.", registry=registry
        )
        self.tier_bytes = Gauge(
            "htc_tier_bytes", "Taken out of a tier's budget.", ["tier"], registry=registry
        )
        self.moved_bytes = Gauge(
            "htc_moved_bytes", "Between tiers, so far.", ["direction"], registry=registry
        )
        self.wait = Gauge(
            "htc_tier_wait_seconds", "The model stood still for a tier, so far.", registry=registry
        )

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"htc_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

    def note_lookup(self, request: Request, restored: int, seconds: float) -> None:
        """A request came to the model and found its cache, `restored` tokens of it in the store."""
        assert request.started is not None
        self.queue.observe(request.started - request.arrived)
        self.lookup.observe(seconds)
        self.prompt_tokens.labels("parked").inc(request.cached_tokens - restored)
        self.prompt_tokens.labels("store").inc(restored)
        self.prompt_tokens.labels("computed").inc(request.prompt_tokens - request.cached_tokens)

    def note_forward(self, num_tokens: int, flops: int, seconds: float) -> None:
        """A forward with so many new tokens."""
        (self.decode if num_tokens == 1 else self.prefill).observe(seconds)
        self.flops.inc(flops)

    def note_stats(self, stats: CacheStats) -> None:
        """Where the tiers stand, that all caches share."""
        for tier in stats.tiers:
            self.tier_bytes.labels(tier.name).set(tier.used_bytes)
        count = stats.counters
        self.moved_bytes.labels("up").set(count.loaded_bytes)
        self.moved_bytes.labels("down").set(count.stored_bytes)
        self.wait.set(count.load_wait_seconds + count.store_wait_seconds)

    def note_token(self, request: Request) -> None:
        """A token of the answer came out."""
        is_first = request.first_token is None
        seconds = request.note_token()
        (self.ttft if is_first else self.itl).observe(seconds)
        self.generated_tokens.inc()

    def text(self) -> bytes:
        """The exposition of now."""
        return generate_latest(self.registry)
