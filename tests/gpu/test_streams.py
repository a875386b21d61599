"""Copies that run beside compute: whatever is late, what is attended is what was appended."""

import pytest
import torch
from gpu.models import BLOCK_BYTES, generate, least_bytes, model_on, prompt_on
from support import new_tokens
from test_generate_parity import check_integrity
from transformers import DynamicCache

HOST = {"host_bytes": "64MiB", "disk_bytes": 0}


class BusyStream:
    """Keeps the current stream far behind the host, so that what does not wait for it comes too
    early. On the CPU, where nothing is late, it does some work."""

    def __init__(self, device: torch.device) -> None:
        size = 4096 if device.type == "cuda" else 32
        self._matrix = torch.randn(size, size, device=device)
        self._times = 4 if device.type == "cuda" else 1

    def work(self) -> None:
        for _ in range(self._times):
            self._matrix = (self._matrix @ self._matrix).clamp(-1, 1)


def busy_model(device: torch.device, stream: BusyStream):
    """A model that falls behind before each of its layers."""
    model = model_on(device, "Llama")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: stream.work())
    return model


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_busy_compute_stream_changes_no_bit(make_cache, device, copy_lane, place):
    ids = prompt_on(device)
    knobs = {**(HOST if place == "host" else {"host_bytes": 0}), **copy_lane}
    idle, busy = model_on(device, "Llama"), busy_model(device, BusyStream(device))
    least = least_bytes(make_cache, idle, ids, **knobs)
    knobs["device_bytes"] = least
    tokens, logits = generate(idle, make_cache(idle.config, None, **knobs), ids)
    for _ in range(1 if device.type == "cpu" else 5):
        cache = make_cache(busy.config, None, **knobs)
        again, same = generate(busy, cache, ids)
        assert torch.equal(again, tokens)
        assert torch.equal(same, logits)
        check_integrity(cache)


def test_a_users_own_stream_is_the_one_that_is_waited_for(make_cache, gpu, copy_lane):
    ids = prompt_on(gpu)
    model = busy_model(gpu, BusyStream(gpu))
    knobs = {**HOST, **copy_lane}
    knobs["device_bytes"] = least_bytes(make_cache, model, ids, **knobs)
    tokens, logits = generate(model, make_cache(model.config, None, **knobs), ids)
    default_is_busy = BusyStream(gpu)
    for _ in range(3):
        default_is_busy.work()
        stream = torch.cuda.Stream(gpu)
        stream.wait_stream(torch.cuda.current_stream(gpu))
        with torch.cuda.stream(stream):
            again, same = generate(model, make_cache(model.config, None, **knobs), ids)
            stream.synchronize()
        assert torch.equal(again, tokens)
        assert torch.equal(same, logits)


def test_a_cache_may_go_from_one_stream_to_another(make_cache, gpu, copy_lane):
    """As long as the caller orders the streams, as for any tensor."""
    ids = prompt_on(gpu)
    model = busy_model(gpu, BusyStream(gpu))
    knobs = {**HOST, **copy_lane}
    knobs["device_bytes"] = least_bytes(make_cache, model, ids, **knobs)
    sequences = []
    for streams in ([None] * 3, [torch.cuda.Stream(gpu) for _ in range(3)]):
        cache, sequence = make_cache(model.config, None, **knobs), ids
        for stream in streams:
            before = torch.cuda.current_stream(gpu)
            with torch.cuda.stream(stream):
                torch.cuda.current_stream(gpu).wait_stream(before)
                sequence = generate(model, cache, sequence)[0].to(gpu)
                before.wait_stream(torch.cuda.current_stream(gpu))
        sequences.append(sequence)
    assert torch.equal(*sequences)


@pytest.mark.parametrize("host_bytes", ["64MiB", 0])
def test_what_was_appended_is_kept_when_the_callers_tensors_change(make_cache, device, host_bytes):
    """Thousands of tiny copies, the sources overwritten at once, the stream far behind."""
    stream = BusyStream(device)
    cache = make_cache(None, None, device_bytes=40 * BLOCK_BYTES, host_bytes=host_bytes)
    held = []
    for layer in range(3):
        keys, values = (states.to(device) for states in new_tokens(1, 400))
        held.append((keys.clone(), values.clone()))
        stream.work()
        for first in range(0, 400, 13):
            part = slice(first, first + 13)
            new = keys[:, :, part].clone(), values[:, :, part].clone()
            cache.update(*new, layer)
            for states in new:
                states.fill_(torch.nan)
    for _ in range(2):
        for layer, (keys, values) in enumerate(held):
            stream.work()
            assert torch.equal(cache.layers[layer].keys.materialize(), keys)
            assert torch.equal(cache.layers[layer].values.materialize(), values)
    check_integrity(cache)


def test_blocks_that_come_and_go_under_a_busy_stream(make_cache, device):
    """Append, crop and reorder while copies of the same slots are under way."""
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    stream = BusyStream(device)
    dense = DynamicCache()
    cache = make_cache(None, None, device_bytes=80 * BLOCK_BYTES, host_bytes="64MiB")
    for step in range(60):
        count = draw(1, 60) if step % 3 == 0 else 1
        for layer in range(2):
            states = [one.to(device) for one in new_tokens(2, count)]
            dense.update(*states, layer)
            cache.update(*states, layer)
            stream.work()
        if step % 5 == 4:
            cropped = min(draw(1, 50), dense.get_seq_length() - 1)
            dense.crop(-cropped)
            cache.crop(-cropped)
        if step % 7 == 6:
            rows = torch.tensor([[1, 0], [0, 0], [1, 1]][draw(0, 3)], device=device)
            dense.reorder_cache(rows)
            cache.reorder_cache(rows)
    assert cache.stats().cold_blocks > 0
    for mine, theirs in zip(cache.layers, dense.layers, strict=True):
        assert torch.equal(mine.keys.materialize(), theirs.keys)
        assert torch.equal(mine.values.materialize(), theirs.values)
    check_integrity(cache)


def test_two_caches_on_two_streams(make_cache, gpu, copy_lane):
    ids = prompt_on(gpu)
    model = busy_model(gpu, BusyStream(gpu))
    knobs = {**HOST, **copy_lane}
    knobs["device_bytes"] = least_bytes(make_cache, model, ids, **knobs)
    expected, _ = generate(model, make_cache(model.config, None, **knobs), ids)
    torch.cuda.synchronize(gpu)
    streams = [torch.cuda.Stream(gpu) for _ in range(2)]
    caches = [make_cache(model.config, None, **knobs) for _ in streams]
    for stream, cache in zip(streams, caches, strict=True):
        with torch.cuda.stream(stream):
            tokens, _ = generate(model, cache, ids)
        assert torch.equal(tokens, expected)
