"""The tiers of one process share their threads: many caches take no more of them than one."""

import gc

import pytest
import torch
from tiers.test_interrupts import left

from hf_tiered_cache import TieredCache
from hf_tiered_cache.tiers import Budget, DiskTier, HostTier

NUM_CACHES = 12
MOST_THREADS = 4 + 4  # the disk's and the host's
BLOCK = 8192


def kinds_left(folder) -> tuple[int, int]:
    """Threads of ours, and open descriptors in `folder`."""
    found = left(folder)
    num_files = sum(name.startswith(str(folder)) for name in found)
    return len(found) - num_files, num_files


@pytest.mark.parametrize("mover", ["compiled", "python"])
def test_many_tiers_take_the_threads_of_one(tmp_path, mover):
    tiers = []
    for _ in range(NUM_CACHES):
        disk = DiskTier(BLOCK, Budget("disk", 8 * BLOCK), tmp_path, io="buffered", mover=mover)
        tiers += [disk, HostTier(BLOCK, Budget("host", 8 * BLOCK))]
    data = torch.randint(0, 256, (len(tiers), 8, BLOCK), dtype=torch.uint8)
    out = torch.zeros_like(data)
    transfers = []
    for number, tier in enumerate(tiers):
        slots = [tier.allocate() for _ in range(8)]
        transfers.append(tier.write(slots, list(data[number])))
        transfers.append(tier.read(slots[::-1], list(out[number].flip(0).unbind())))
        transfers.append(tier.read(slots, list(out[number])))
    num_threads, num_files = kinds_left(tmp_path)
    assert 0 < num_threads <= MOST_THREADS
    assert num_files == NUM_CACHES
    for transfer in transfers:
        transfer.wait()
    assert torch.equal(out, data)
    for tier in tiers[:-2]:
        tier.close()
    tiers[-1].read([0], [out[0, 0]]).wait()  # who stays is served as before
    tiers[-2].read([0], [out[0, 1]]).wait()
    assert torch.equal(out[0, :2], data[[-1, -2], 0])
    for tier in tiers[-2:]:
        tier.close()
    assert left(tmp_path) == []


def test_a_slow_and_a_failing_tier_leave_the_others_alone(tmp_path):
    from tiers import faulty_file as faults

    slow, failing = (
        DiskTier(BLOCK, Budget("disk", 8 * BLOCK), tmp_path, open_file=faults.FaultyFile)
        for _ in range(2)
    )
    good = DiskTier(BLOCK, Budget("disk", 8 * BLOCK), tmp_path, mover="python")
    slow._file.plan = {("write", number): faults.slow for number in range(8)}
    failing._file.plan = {("write", number): faults.fails_with(5) for number in range(8)}
    data = torch.randint(0, 256, (8, BLOCK), dtype=torch.uint8)
    writes = []
    for tier in (slow, failing, good):
        slots = [tier.allocate() for _ in range(8)]
        writes += [tier.write([slot], [data[slot]]) for slot in slots]
    out = torch.zeros_like(data)
    good.read(list(range(8)), list(out)).wait()
    assert torch.equal(out, data)
    for write in writes:
        write.outlast()
    slow.read(list(range(8)), list(out.zero_())).wait()
    assert torch.equal(out, data)
    for tier in (slow, failing, good):
        tier.close()
    assert left(tmp_path) == []


def test_many_spilled_caches_take_a_bounded_number_of_threads_and_a_file_each(tmp_path):
    caches, kept = [], []
    for number in range(NUM_CACHES):
        generator = torch.Generator().manual_seed(number)
        keys, values = torch.randn(2, 1, 2, 64, 16, generator=generator)
        cache = TieredCache(
            device_bytes="48KiB",
            host_bytes="16KiB",
            disk_bytes="8MiB",
            disk_dir=tmp_path,
            block_tokens=4,
        )
        for layer in range(2):
            for token in range(0, 64, 4):
                part = slice(token, token + 4)
                held = cache.update(keys[:, :, part], values[:, :, part], layer)
        caches.append(cache)
        kept.append((keys, values, held))
        assert {tier.name: tier.blocks > 0 for tier in cache.stats().tiers}["disk"]
    num_threads, num_files = kinds_left(tmp_path)
    assert num_threads <= MOST_THREADS
    assert num_files <= 2 * NUM_CACHES
    for keys, values, held in kept:
        assert torch.equal(held[0] + 0, keys)
        assert torch.equal(held[1] + 0, values)
    print(f"{NUM_CACHES} spilled caches: {num_threads} threads, {num_files} descriptors")
    del held
    kept.clear()
    for cache in caches:
        cache.close()
    caches.clear()
    gc.collect()
    assert left(tmp_path) == []
