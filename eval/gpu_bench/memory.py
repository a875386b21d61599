"""How much fits: the longest context, and device memory at its peak."""

from collections.abc import Iterator

import torch
from sections import Row, Skipped, at_least, at_most
from transformers import Cache, DynamicCache

from gpu_bench.machine import GIB
from gpu_bench.workshop import HOST_SPARE_BYTES, Bench
from hf_tiered_cache.config import free_memory_bytes

SMALL_GPU_BYTES = 24_000_000_000


def capacity(bench: Bench) -> Iterator[Row]:
    """The longest context that decodes when the process may use 24 GB."""
    bench.model  # noqa: B018 - its memory counts
    machine, sizes, target = bench.machine, bench.sizes, 4.0
    with machine.limited_to(SMALL_GPU_BYTES):
        theirs = longest_dynamic(bench)
        asked = int(target * theirs)
        knobs = small_budget(bench, asked)
        if knobs["host_bytes"] > (host := free_memory_bytes()):
            raise Skipped(
                f"{knobs['host_bytes'] / GIB:.0f} GiB of host memory needed for {target:g} times "
                f"the {theirs:,} tokens of DynamicCache, {host / GIB:.0f} GiB are free"
            )
        with bench.tiered(asked + sizes.new + 1, 0.9, **knobs) as cache:
            random_fill(bench, cache, asked)
            seconds = bench.token_time(cache, sizes.new).device
            ours = cache.get_seq_length()
    yield at_least(
        "longest context on 24 GB over DynamicCache's",
        ours / theirs,
        target,
        ">= 5.7",
        note=f"{ours:,} tokens decode at {seconds * 1e3:.0f} ms each, theirs end at {theirs:,}; "
        "longer ones were not tried",
        data={"ours": ours, "theirs": theirs},
    )


def small_budget(bench: Bench, context: int) -> dict[str, int]:
    """Knobs of a cache for a device that has little room: an eighth of what the process may use,
    the rest in host memory."""
    whole = (bench.layout.num_blocks(context) + 2) * bench.num_layers * bench.layout.num_bytes
    device = SMALL_GPU_BYTES // 8 if bench.machine.is_cuda else whole // 4
    return {
        "device_bytes": device + bench.sizes.staging_bytes,
        "host_bytes": whole + HOST_SPARE_BYTES,
    }


def longest_dynamic(bench: Bench) -> int:
    """Tokens that a `DynamicCache` holds while it still decodes; it grows until memory is out."""
    dynamic, good = DynamicCache(config=bench.sizes.config), 0
    try:
        while True:
            random_fill(bench, dynamic, bench.sizes.step)
            length = dynamic.get_seq_length()
            bench.machine.check_cache(length * bench.token_bytes())
            bench.token_time(dynamic, bench.sizes.new)
            good = length
    except torch.OutOfMemoryError:
        if not good:
            raise
    return good


def random_fill(bench: Bench, cache: Cache, num_tokens: int) -> None:
    """Append random keys and values to every layer, in the chunks of a prefill."""
    layout = bench.layout
    for first in range(0, num_tokens, bench.sizes.prefill):
        count = min(bench.sizes.prefill, num_tokens - first)
        shape = (2, 1, layout.kv_heads, count, layout.key_dim)
        for index in range(bench.num_layers):
            states = torch.randn(shape, dtype=layout.dtype, device=bench.machine.device)
            cache.update(*states.unbind(0), index)


@torch.no_grad()
def memory(bench: Bench) -> Iterator[Row]:
    """Device memory at its peak, over the budget, in decode and prefill."""
    machine, sizes, model = bench.machine, bench.sizes, bench.model
    context = bench.context_that_fits(sizes.short, [0.9])
    chunk = bench.ids(sizes.prefill)
    before = machine.allocated_bytes()
    with machine.peak_bytes() as alone:  # what the model itself takes while it runs
        model(chunk, use_cache=False, logits_to_keep=1)
    of_model = max(0, alone[0] - before)
    free, before = machine.free_bytes(), machine.allocated_bytes()
    with bench.tiered(context + sizes.prefill, 0.75) as cache, machine.peak_bytes() as peak:
        random_fill(bench, cache, context)
        bench.token_time(cache, sizes.new)
        bench.prefill_time(cache, chunk, "tiered")  # with "sdpa" its mask would count
        device = cache.stats().tiers[0]
        taken = free - machine.free_bytes()
    budget = device.budget_bytes
    held = max(peak[0] - before - of_model, device.peak_bytes)
    yield at_most(
        "device memory at its peak over the budget",
        held / budget,
        1.05,
        "<= 1.05",
        note=f"{held / GIB:.2f} of {budget / GIB:.2f} GiB, {of_model / GIB:.2f} of the model's "
        f"own taken off; the driver gave {taken / GIB:.2f}",
        data={"held": held, "budget": budget, "of_model": of_model, "taken": taken},
    )
