"""Seconds of a decode step and of a prefill, from counts and rates: closed formulas, no measuring.

One layer of a decode step, where the ring of staging slots is the only store between loads and
attention:

    apart    = the layer's other work + attending what lies where it is attended
    attended = attending what came through staging
    loading  = loads of one layer
    step     = apart + max(attended, loading - min(ring, apart))

since loads run ahead over layers and tokens, but no further than the ring is large: behind a long
`apart` a link or disk stands still once the ring is full. The work behind the last layer counts to
the `apart` of the first. On a CPU loads take time of the processors as well (copies, checksums), so
a step never takes less than all of that work shared by all of them. A device behind a copy lane
takes its work from a host that runs ahead: the longer of the two counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from hf_tiered_cache.planner.placement import (
    DISK,
    HOST,
    CacheShape,
    Placement,
    TierSizes,
    place,
    seen_before,
)


@dataclass(frozen=True)
class Figure:
    """A number of a machine or model: bytes or multiplications per second, or seconds; and where
    it comes from: a probe, a document, an assumption."""

    value: float
    source: str


@dataclass(frozen=True)
class Rates:
    """What a machine gives. Bytes are those of blocks, attended once for a query of each head."""

    attend: Figure  # bytes per second of blocks where attention is computed
    prefill_attend: Figure  # multiplications per second of attending many queries
    disk_read: Figure | None = None  # bytes per second, verified
    disk_write: Figure | None = None
    disk_read_work: Figure | None = None  # processor seconds of reading a byte; None: not counted
    link: Figure | None = None  # host memory to device; None: they are the same
    processors: int = 1

    @property
    def is_behind_lane(self) -> bool:
        """Whether the device is other than the host."""
        return self.link is not None


@dataclass(frozen=True)
class ModelPace:
    """A model without a past. Seconds of one token (`decode`) and of each token of a long chunk
    (`prefill`), in one layer, and in all that is not a layer; of the device."""

    decode_layer: Figure
    decode_rest: Figure
    prefill_layer: Figure
    prefill_rest: Figure
    host: Figure | None = None  # seconds that a token takes the host of a device behind a lane


@dataclass(frozen=True)
class Mode:
    """A way of decoding, by what it changes: the seam for what shortens loads or shares them.

    cold_share: bytes of a cold block over those of a raw one. attend_factor: rate of attending cold
    blocks over that of raw ones. tokens_per_pass: tokens that one pass over the cache gives;
    pass_factor: time of the model in such a pass over that of one token; draft_seconds: before it.
    """

    name: str = "plain"
    cold_share: float = 1.0
    attend_factor: float = 1.0
    tokens_per_pass: float = 1.0
    pass_factor: float = 1.0
    draft_seconds: float = 0.0


PLAIN = Mode()
WORTH_SAYING = 1.02  # times as fast


@dataclass(frozen=True)
class Prediction:
    """Seconds of a whole phase for its tokens, and what they consist of; parts overlap."""

    seconds: float
    num_tokens: float  # of one sequence
    parts: dict[str, float]  # seconds that each would take alone

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def binds(self) -> str:
        """The part that would take longest alone."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Plan:
    """A context of a model under a budget on a machine. Everything follows from these."""

    shape: CacheShape
    sizes: TierSizes
    context: int
    chunk: int  # tokens of a prefill forward
    query_heads: int
    rates: Rates
    pace: ModelPace

    @cached_property
    def placement(self) -> Placement:
        """Where the blocks of the whole context lie. Raises OutOfBlocksError."""
        return place(self.shape, self.context, self.sizes, self.chunk)

    def decode(self, mode: Mode = PLAIN) -> Prediction:
        """Tokens behind the context."""
        placement, rates, pace = self.placement, self.rates, self.pace
        layers = self.shape.num_layers
        here, staged, loads = _ways(placement, rates, mode.cold_share)
        model = pace.decode_layer.value * mode.pass_factor
        rest = pace.decode_rest.value * mode.pass_factor
        attended_here = here / rates.attend.value
        attended_staged = staged / (rates.attend.value * mode.attend_factor)
        ring = placement.staging_bytes / staged if staged else 0.0  # share of a token's loads
        loading = max(loads.values(), default=0.0)
        apart = model + attended_here / layers
        # The ring is filled while nothing takes from it.
        steps = [
            part + max(attended_staged / layers, loading / layers - min(ring * loading, part))
            for part in (apart, apart + rest)
        ]
        seconds = steps[0] * (layers - 1) + steps[1]
        parts = {
            "the model": layers * model + rest,
            "attention": attended_here + attended_staged,
            **{f"reading the {name}": one for name, one in loads.items()},
        }
        computing = parts["the model"] + parts["attention"]
        if rates.disk_read_work is not None:
            work = placement.home_bytes(DISK) * mode.cold_share * rates.disk_read_work.value
            seconds = max(seconds, computing + work / rates.processors)
        if pace.host is not None:
            parts["the host"] = pace.host.value
            seconds = max(seconds, pace.host.value)
        return Prediction(seconds + mode.draft_seconds, mode.tokens_per_pass, parts)

    @cached_property
    def prefill(self) -> Prediction:
        """The context itself, chunk by chunk, through a plain forward."""
        total: dict[str, float] = {}
        seconds = 0.0
        for before, count in seen_before(self.context, self.chunk):
            parts = self._chunk_parts(before, count)
            computing = parts["the model"] + parts["attention"]
            moving = (
                sum(one for name, one in parts.items() if name.startswith("reading"))
                + parts["writing the disk"]
            )
            seconds += max(computing, moving)
            for name, one in parts.items():
                total[name] = total.get(name, 0.0) + one
        return Prediction(seconds, self.context, {name: one for name, one in total.items() if one})

    def _chunk_parts(self, before: int, count: int) -> dict[str, float]:
        """Seconds of a chunk of `count` tokens behind `before` others."""
        shape, rates, pace = self.shape, self.rates, self.pace
        dims = shape.layout.key_dim + shape.layout.value_dim
        pairs = shape.batch * count * (before + count / 2)
        parts = {
            "the model": count
            * (shape.num_layers * pace.prefill_layer.value + pace.prefill_rest.value),
            "attention": shape.num_layers
            * self.query_heads
            * dims
            * pairs
            / rates.prefill_attend.value,
            "writing the disk": 0.0,
        }
        past = place(shape, before, self.sizes, self.chunk) if before else None
        now = place(shape, before + count, self.sizes, self.chunk)
        if past is not None:
            _, _, loads = _ways(past, rates, 1.0)
            parts |= {f"reading the {name}": one for name, one in loads.items()}
        if rates.disk_write is not None:
            stored = now.home_bytes(DISK) - (past.home_bytes(DISK) if past else 0)
            parts["writing the disk"] = stored / rates.disk_write.value
        return parts

    def knobs(self, mode: Mode = PLAIN) -> "list[Advice]":
        """What raising a budget would give, the largest gain first; those that give nothing are
        not among them."""
        now = self.decode(mode).tokens_per_second
        found = []
        block_bytes = self.shape.layout.num_bytes
        all_bytes = self.shape.num_blocks(self.context) * block_bytes
        whole = all_bytes + self.sizes.staging_slots * block_bytes
        for knob, size, sizes in self._larger(whole, all_bytes):
            gain = replace(self, sizes=sizes).decode(mode).tokens_per_second
            if gain > now * WORTH_SAYING:
                found.append(Advice(knob, size, gain, gain / now))
        return sorted(found, key=lambda advice: -advice.factor)

    def _larger(self, whole: int, all_bytes: int) -> Iterable[tuple[str, int, TierSizes]]:
        """Each knob that could be raised, its size then, and all sizes with it."""
        sizes = self.sizes
        if sizes.device_bytes < whole:
            size = min(whole, 2 * sizes.device_bytes)
            yield "device_bytes", size, replace(sizes, device_bytes=size)
        below = self.placement.cold_bytes
        if self.rates.is_behind_lane and self.placement.home_bytes(DISK):
            size = min(all_bytes, max(2 * sizes.host_bytes, below))
            yield "host_bytes", size, replace(sizes, host_bytes=size)


@dataclass(frozen=True)
class Advice:
    """A knob, and what decoding gains by it."""

    knob: str
    num_bytes: int
    tokens_per_second: float
    factor: float


def _ways(
    placement: Placement, rates: Rates, cold_share: float
) -> tuple[int, float, dict[str, float]]:
    """Of what a token reads: bytes attended where they lie, bytes through staging (raw), and the
    seconds of each way of loading them."""
    host, disk = placement.home_bytes(HOST), placement.home_bytes(DISK)
    here, loads = placement.resident_bytes, {}
    if disk:
        assert rates.disk_read is not None, "there is a rate for every tier that holds blocks"
        loads["disk"] = disk * cold_share / rates.disk_read.value
    from_disk = placement.cold_bytes - host  # as attention takes them
    if rates.link is None:
        return here + host, from_disk, loads
    if host or from_disk:
        loads["link"] = (host + from_disk) * cold_share / rates.link.value
    return here, host + from_disk, loads
