"""A plan for a model of transformers: what of it lies in blocks, and how fast it is here.

The model may be an outline on the meta device, made of a config alone: its keys and values are
looked at there, and what it takes is measured on its first layers, made for it and let go.
"""

import copy
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from hf_tiered_cache.blocks.assembly import PAGE_CACHE_SHARE, codec_for, staging_slots
from hf_tiered_cache.config import (
    AUTO_DEVICE_SHARE,
    Budgets,
    TieredCacheConfig,
    free_memory_bytes,
)
from hf_tiered_cache.devices import Device, has_accelerator
from hf_tiered_cache.errors import ConfigError, UnsupportedInputError
from hf_tiered_cache.layout import BlockLayout, default_block_tokens
from hf_tiered_cache.planner import rates as probes
from hf_tiered_cache.planner.placement import DISK, CacheShape, TierSizes, place
from hf_tiered_cache.planner.prediction import Figure, ModelPace, Plan, Rates
from hf_tiered_cache.planner.profiles import DeviceProfile
from hf_tiered_cache.sizes import AUTO, format_bytes

IN_BLOCKS = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
CHUNK = 1024  # tokens of a prefill forward
PROBED_BYTES = 64 * 1024 * 1024  # of weights at least: more than most processors' caches hold
ROUNDS = 5
PREFILL_TOKENS = (16, 256)  # the second where the first ones take no longer than SECONDS
SECONDS = 0.3


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model."""

    kv_heads: int
    key_dim: int
    value_dim: int
    query_heads: int
    num_in_blocks: int  # layers whose keys and values are kept in blocks
    num_layers: int
    weight_bytes: int  # read for a token: of a mixture of experts those that it goes to
    rest_bytes: int  # of these what is in no layer, but for what is only looked up
    dtype: torch.dtype

    def cache_shape(self, block_tokens: int | None, batch: int = 1) -> CacheShape:
        """Of a cache for it."""
        tokens = block_tokens or default_block_tokens(max(self.key_dim, self.value_dim), self.dtype)
        layout = BlockLayout(self.kv_heads, self.key_dim, self.value_dim, tokens, self.dtype)
        return CacheShape(layout, self.num_in_blocks, batch)


@torch.no_grad()
def model_shape(model: PreTrainedModel) -> ModelShape:
    """Look at one token's keys and values. Raises UnsupportedInputError for a model of which no
    layer is kept in blocks, or whose layers differ in their heads."""
    outline = model if model.device.type == "meta" else _outline(model)
    cache = DynamicCache(config=outline.config)
    # In bfloat16, since torch's grouped products know nothing else on the meta device (2.13).
    _outline(model, dtype=torch.bfloat16)(
        torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache
    )
    layers = [layer for layer in cache.layers if type(layer) in IN_BLOCKS]
    found = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers}
    if len(found) != 1:
        what = "no layer in blocks" if not found else f"blocks of {len(found)} shapes"
        raise UnsupportedInputError(
            f"{type(model).__name__} keeps {what}: plans are for models whose full-attention layers"
            " have the same key-value heads"
        )
    ((kv_heads, key_dim, value_dim),) = found
    text = outline.config.get_text_config()
    num_layers = text.num_hidden_layers
    sizes = {name: p.numel() * p.element_size() for name, p in outline.named_parameters()}
    in_layers = {
        name: size
        for name, size in sizes.items()
        if any(part.isdigit() for part in name.split("."))
    }
    experts = _active_share(text)
    of_layers = sum(
        int(size * experts) if ".experts" in name else size for name, size in in_layers.items()
    )
    looked_up = outline.get_input_embeddings().weight
    output = outline.get_output_embeddings()
    rest = sum(sizes.values()) - sum(in_layers.values())
    if output is None or output.weight is not looked_up:
        rest -= looked_up.numel() * looked_up.element_size()
    return ModelShape(
        kv_heads,
        key_dim,
        value_dim,
        text.num_attention_heads,
        len(layers),
        num_layers,
        of_layers + rest,
        rest,
        model.dtype,
    )


def _active_share(config: Any) -> float:
    """Of the experts' weights, what one token goes through."""
    active = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((n for name in names if (n := getattr(config, name, None))), None)
    return active / total if active and total else 1.0


def _outline(
    model: PreTrainedModel, num_layers: int | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The same model on the meta device, or its first layers; in its own dtype where none is
    given."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype or model.dtype
    if num_layers is not None:
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = num_layers
        if kinds:
            text.layer_types = kinds[:num_layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def plan_for(
    model: PreTrainedModel,
    tiers: TieredCacheConfig,
    context: int,
    *,
    batch: int = 1,
    chunk: int = CHUNK,
    device: torch.device | None = None,
) -> Plan:
    """A plan by rates that are measured here, now, in some seconds.

    model: with its weights, then all of it is measured; or on the meta device, then its first
    layers are. Raises ConfigError and OutOfBlocksError as the cache would, UnsupportedInputError
    for a model that cannot be planned for.
    """
    _check_sizes(context, batch, chunk)
    is_outline = model.device.type == "meta"
    where = device or (torch.device("cpu") if is_outline else model.device)
    shape = model_shape(model)
    blocks = shape.cache_shape(tiers.block_tokens, batch)
    sizes = local_sizes(tiers, blocks, where)
    placement = place(blocks, context, sizes, chunk)  # what does not fit is said before the probes
    pace = measure_pace(model, shape, batch, chunk, where)
    lower = {tier.name: tier.blocks for tier in placement.tiers[1:]}
    rates = measure_rates(shape, blocks, tiers, lower, context, where)
    return Plan(blocks, sizes, context, chunk, shape.query_heads, rates, pace)


def plan_by_profile(
    model: PreTrainedModel,
    tiers: TieredCacheConfig,
    context: int,
    profile: DeviceProfile,
    *,
    batch: int = 1,
    chunk: int = CHUNK,
) -> Plan:
    """A plan by the numbers of a profile: nothing is measured, nothing here is looked at. Host and
    disk hold whatever does not fit above, unless their sizes are given."""
    _check_sizes(context, batch, chunk)
    shape = model_shape(model)
    blocks = shape.cache_shape(tiers.block_tokens, batch)
    device_bytes = tiers.device_bytes
    if device_bytes == AUTO:
        free = profile.memory_bytes - shape.weight_bytes
        if free <= 0:
            raise ConfigError(
                f"the model's {format_bytes(shape.weight_bytes)} of weights do not fit into the"
                f" {format_bytes(profile.memory_bytes)} of a {profile.name}"
            )
        device_bytes = int(free * AUTO_DEVICE_SHARE)
    # With the copies that are made ahead.
    whole = 2 * (blocks.num_blocks(context) + blocks.column_blocks) * blocks.layout.num_bytes
    host, disk = (
        whole if size == AUTO else int(size) for size in (tiers.host_bytes, tiers.disk_bytes)
    )
    sizes = TierSizes(
        int(device_bytes),
        host,
        disk,
        staging_slots(tiers, int(device_bytes), blocks.layout.num_bytes, has_lane=True),
        device_is_host=False,
        record_bytes=_record_bytes(tiers, blocks.layout),
    )
    layer_bytes = (shape.weight_bytes - shape.rest_bytes) / shape.num_layers
    pace = profile.pace(shape.num_layers, layer_bytes, shape.rest_bytes, shape.dtype.itemsize)
    return Plan(blocks, sizes, context, chunk, shape.query_heads, profile.rates(), pace)


def _check_sizes(context: int, batch: int, chunk: int) -> None:
    for name, number in (("context", context), ("batch", batch), ("chunk", chunk)):
        if number < 1:
            raise UnsupportedInputError(f"{name}={number}: expected 1 or more")


def local_sizes(tiers: TieredCacheConfig, blocks: CacheShape, where: torch.device) -> TierSizes:
    """What a cache with these knobs would have on this machine. Raises ConfigError as it would."""
    if tiers.extra_tiers:
        raise UnsupportedInputError("extra_tiers: plans know device, host and disk only")
    budgets = Budgets.resolve(tiers, device_is_host=not has_accelerator())
    device = Device.kind_of(where)(where)
    try:
        device_bytes = budgets.device_bytes
        if budgets.device_is_auto:
            device_bytes = int(device.free_bytes() * AUTO_DEVICE_SHARE)
        has_lane = device.copy_lane is not None
        has_host = has_lane or not budgets.host_is_auto
        return TierSizes(
            device_bytes,
            budgets.host_bytes if has_host else 0,
            budgets.disk_bytes,
            staging_slots(tiers, device_bytes, blocks.layout.num_bytes, has_lane=has_lane),
            device.group_columns(blocks.layout),
            device.is_host,
            _record_bytes(tiers, blocks.layout),
        )
    finally:
        device.close()


def _record_bytes(tiers: TieredCacheConfig, layout: BlockLayout) -> int:
    codec = codec_for(tiers.packing, layout)
    return layout.num_bytes if codec is None else codec.encoded_bytes


def measure_rates(
    shape: ModelShape,
    blocks: CacheShape,
    tiers: TieredCacheConfig,
    lower: dict[str, int],
    context: int,
    where: torch.device,
) -> Rates:
    """Probe what this plan needs. lower: blocks that will lie on the tiers below the device. Raises
    ConfigError, TierIOError where the disk cannot be probed."""
    name = f"{'x'.join(map(str, (blocks.batch, shape.query_heads)))} queries"
    total = blocks.num_blocks(context) * blocks.layout.num_bytes
    probed = max(total, shape.weight_bytes, PROBED_BYTES)
    attend = probes.attention_rate(blocks, context, shape.query_heads, probed, where)
    prefill = probes.prefill_attention_rate(blocks.layout, shape.query_heads, where)
    link = None
    if not Device.kind_of(where).is_host:
        device = Device.kind_of(where)(where)
        try:
            if device.copy_lane is not None and device.pinning is not None:
                link = Figure(
                    probes.link_rate(where), "probe: copies of pinned memory to the device"
                )
        finally:
            device.close()
    disk: dict[str, Figure] = {}
    if num_blocks := lower.get(DISK):
        disk = _disk_figures(blocks.layout.num_bytes, num_blocks, tiers)
    return Rates(
        attend=Figure(attend, f"probe: the kernel, {name}, over {format_bytes(probed)} at most"),
        prefill_attend=Figure(prefill, f"probe: the kernel, {probes.PREFILL_QUERIES} queries"),
        link=link,
        processors=torch.get_num_threads(),
        **disk,
    )


def _disk_figures(block_bytes: int, num_blocks: int, tiers: TieredCacheConfig) -> dict[str, Figure]:
    """Of the records as they will lie: the first ones in the page cache where that has room."""
    budgets = Budgets.resolve(tiers)
    cached = int(free_memory_bytes() * PAGE_CACHE_SHARE) // block_bytes
    buffered = {"direct": 0, "buffered": num_blocks}.get(tiers.disk_io, min(num_blocks, cached))
    shares = {False: buffered / num_blocks, True: 1 - buffered / num_blocks}
    read = write = work = 0.0  # seconds of a byte
    names = []
    for is_direct, share in shares.items():
        if not share:
            continue
        found = probes.disk_rates(
            budgets.disk_dir, is_direct, probes.SECONDS / 2, record_bytes=block_bytes
        )
        if found is None:
            raise ConfigError(
                f"too little space in {budgets.disk_dir} to measure its rate: give another folder"
                " with disk_dir="
            )
        read += share / found.read
        write += share / found.write
        work += share * found.read_work
        names.append(f"{share:.0%} {'past' if is_direct else 'through'} the page cache")
    how = f"probe: records of {format_bytes(block_bytes)}, {', '.join(names)}"
    return {
        "disk_read": Figure(1 / read, how),
        "disk_write": Figure(1 / write, how),
        "disk_read_work": Figure(work, how),
    }


@torch.no_grad()
def measure_pace(
    model: PreTrainedModel, shape: ModelShape, batch: int, chunk: int, where: torch.device
) -> ModelPace:
    """Put a few tokens through the model, or through its first layers where it is an outline."""
    numbers = _probed_layers(model, shape)
    sides = [model] if model.device.type != "meta" else [_made(model, n, where) for n in numbers]
    if len(sides) == 1:
        numbers = numbers[-1:]
    decode = _seconds(sides, batch, 1, ROUNDS)
    prefill_tokens, most = PREFILL_TOKENS
    prefill = [s / prefill_tokens for s in _seconds(sides, batch, prefill_tokens, 3)]
    if prefill[-1] * prefill_tokens < SECONDS:
        tokens = min(chunk, most)
        prefill = [s / tokens for s in _seconds(sides, batch, tokens, 2)]
    source = (
        "probe: the model itself"
        if len(numbers) == 1
        else f"probe: its first {numbers[0]} and {numbers[1]} layers, made up"
    )

    def parts(seconds: list[float]) -> tuple[Figure, Figure]:
        if len(seconds) == 1:
            layer, rest = seconds[0] / shape.num_layers, 0.0
        else:
            layer = max(seconds[1] - seconds[0], 0.0) / (numbers[1] - numbers[0])
            rest = max(seconds[0] - numbers[0] * layer, 0.0)
        return Figure(layer, source), Figure(rest, source)

    host = None
    decode_layer, decode_rest = parts(decode)
    if where.type != "cpu":  # which the device's own time lies behind
        host = Figure(shape.num_layers * decode_layer.value + decode_rest.value, source)
    return ModelPace(decode_layer, decode_rest, *parts(prefill), host)


def _probed_layers(model: PreTrainedModel, shape: ModelShape) -> list[int]:
    """Two numbers of layers from whose times those of one layer and of the rest follow; or that of
    all, where it is hardly larger."""
    layer_bytes = max(1, (shape.weight_bytes - shape.rest_bytes) // shape.num_layers)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    period = max(kinds.index(kind) for kind in set(kinds)) + 1
    fewest = period * -(-PROBED_BYTES // (layer_bytes * period))
    if 3 * fewest >= shape.num_layers:
        return [shape.num_layers]
    return [fewest, 2 * fewest]


def _made(model: PreTrainedModel, num_layers: int, where: torch.device) -> PreTrainedModel:
    """The first layers of an outline, of weights that are the same everywhere."""
    made = _outline(model, num_layers)
    size = sum(p.numel() * p.element_size() for p in made.parameters())
    if where.type == "cpu" and size > (free := free_memory_bytes()) // 2:
        raise ConfigError(
            f"{num_layers} layers of the model ({format_bytes(size)}) are made to be measured,"
            f" more than half of the {format_bytes(free)} of memory free: give --device-profile"
        )
    made = made.to_empty(device=where)
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.fill_(1 if not tensor.is_floating_point() else 0.01)
    return made


def _seconds(sides: list[PreTrainedModel], batch: int, num_tokens: int, rounds: int) -> list[float]:
    """Of a forward of so many tokens without a past, each side in turn; the fastest."""

    def once(model: PreTrainedModel) -> float:
        ids = torch.ones(batch, num_tokens, dtype=torch.long, device=model.device)
        cache: Cache = DynamicCache(config=model.config)
        start = perf_counter()
        model(ids, past_key_values=cache, logits_to_keep=1).logits.sum().item()
        return perf_counter() - start

    for model in sides:
        once(model)
    times = [[once(model) for model in sides] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]
