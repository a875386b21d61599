"""The disk tier with a codec: blocks that go into fewer bytes, and those that do not."""

import errno
import os

import pytest
import torch
from tiers.codecs.test_contract import normal

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers import Budget, DiskTier, Surroundings
from hf_tiered_cache.tiers.codecs import Bf16TwelveBit
from hf_tiered_cache.transfers import AllOf

LAYOUT = BlockLayout(2, 64, 64, 256, torch.bfloat16)
BLOCK, RECORD = 128 * 1024, 100 * 1024


def unpackable(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["compiled direct", "compiled buffered", "python direct"])
def make(request, tmp_path):
    """Makes the tier under test, of so many bytes."""
    mover, io = request.param.split()
    tiers = []

    def make_tier(num_bytes: int):
        with ops.use_kernel("reference" if mover == "python" else ops.available_kernels()[0]):
            codec = Bf16TwelveBit(LAYOUT)
        around = Surroundings(tmp_path, io, 0, None, frozenset(), codec)
        tiers.append(DiskTier.from_budget(BLOCK, Budget("disk", num_bytes), around))
        return tiers[-1]

    yield make_tier
    for tier in tiers:
        tier.close()


def read(tier, slots) -> torch.Tensor:
    out = torch.zeros(len(slots), BLOCK, dtype=torch.uint8)
    tier.read(slots, list(out)).wait()
    return out


def test_a_record_takes_three_quarters(make):
    tier = make(10 * RECORD)
    assert (tier.block_bytes, tier.record_bytes, tier.num_free()) == (BLOCK, RECORD, 10)
    slots = [tier.allocate() for _ in range(10)]
    assert tier.allocate() is None
    data = torch.stack([normal(LAYOUT, seed) for seed in range(10)])
    tier.write(slots, list(data)).wait()
    assert torch.equal(read(tier, slots), data)
    assert tier.used_bytes == tier.committed_bytes == tier.budget.used_bytes == 10 * RECORD
    assert all(map(tier.is_encoded, slots))
    encoded = torch.zeros(10, RECORD, dtype=torch.uint8)
    tier.read_encoded(slots, list(encoded)).wait()
    for one, block in zip(encoded, data, strict=True):
        out = torch.zeros(BLOCK, dtype=torch.uint8)
        tier.codec.decode(one, out)
        assert torch.equal(out, block)


def test_blocks_that_cannot_be_encoded_are_kept_as_they_are(make):
    tier = make(20 * BLOCK)
    slots = [tier.allocate() for _ in range(8)]
    data = torch.stack([unpackable(n) if n in (2, 3, 7) else normal(LAYOUT, n) for n in range(8)])
    write = tier.write(slots, list(data))
    assert torch.equal(read(tier, slots), data)  # also what is under way
    write.wait()
    assert [tier.is_encoded(slot) for slot in slots] == [n not in (2, 3, 7) for n in range(8)]
    order = [7, 0, 3, 3, 5, 2]
    assert torch.equal(read(tier, order), data[order])
    assert tier.used_bytes == 8 * RECORD + 3 * BLOCK

    tier.write([slots[2], slots[4]], [data[1], data[7]]).wait()  # each becomes the other kind
    assert (tier.is_encoded(slots[2]), tier.is_encoded(slots[4])) == (True, False)
    assert torch.equal(read(tier, slots), data[[0, 1, 1, 3, 7, 5, 6, 7]])
    for slot in slots[2:]:
        tier.free(slot)
    assert tier.used_bytes == 2 * RECORD
    assert torch.equal(read(tier, slots[:2]), data[:2])


def test_one_that_finds_no_room_fails_and_disturbs_nobody(make):
    tier = make(4 * RECORD)
    slots = [tier.allocate() for _ in range(4)]
    data = [normal(LAYOUT, 0), unpackable(1), normal(LAYOUT, 2)]
    write = tier.write(slots[:3], data)
    for _ in range(2):
        with pytest.raises(TierIOError, match=r"packed.*128.0 KiB.*raise disk_bytes") as no:
            write.wait()
        assert no.value.errno == errno.ENOSPC
    assert torch.equal(read(tier, slots[::2][:2])[0], data[0])
    assert torch.equal(read(tier, [slots[2]])[0], data[2])
    with pytest.raises(TierIOError, match="cannot be packed"):
        read(tier, [slots[1]])
    tier.write([slots[1]], [data[0]]).wait()
    assert torch.equal(read(tier, [slots[1]])[0], data[0])
    assert tier.used_slots == 4


def test_what_is_kept_and_what_is_drained_includes_them(make):
    tier = make(20 * BLOCK)
    slots = [tier.allocate() for _ in range(4)]
    data = torch.stack([unpackable(0), normal(LAYOUT, 1), unpackable(2), normal(LAYOUT, 3)])
    tier.write(slots, list(data))
    tier.drain()
    tier.keep_only(slots[:2])
    assert tier.used_bytes == 2 * RECORD + BLOCK
    assert torch.equal(read(tier, slots[:2]), data[:2])
    tier.close()
    assert tier.budget.used_bytes == 0


def test_a_changed_byte_is_noticed_in_either(make):
    tier = make(20 * BLOCK)
    slots = [tier.allocate(), tier.allocate()]
    tier.write(slots, [normal(LAYOUT), unpackable(0)]).wait()
    for part, slot in ((tier._encoded, slots[0]), (tier._whole, slots[1])):
        fd = part._file.entrance(direct=False).fd
        os.fsync(fd)
        byte = os.pread(fd, 1, 5000)
        os.pwrite(fd, bytes([byte[0] ^ 1]), 5000)
        os.fsync(fd)
        with pytest.raises(TierIOError, match="is not what was stored"):
            read(tier, [slot])
    with pytest.raises(TierIOError, match="is not what was stored"):
        tier.read_encoded(slots[:1], [torch.zeros(RECORD, dtype=torch.uint8)]).wait()


def test_memory_need_not_be_aligned(make):
    tier = make(20 * BLOCK)
    slots = [tier.allocate(), tier.allocate()]
    room = torch.zeros(2 * BLOCK + 3, dtype=torch.uint8)
    odd = [room[3:][:BLOCK], room[3 + BLOCK :][:BLOCK]]
    for block, data in zip(odd, (normal(LAYOUT), unpackable(0)), strict=True):
        block.copy_(data)
    tier.write(slots, odd).wait()
    kept = room.clone()
    room[3:] = 0
    tier.read(slots, odd).wait()
    assert torch.equal(room, kept)


def test_it_is_stored_by_whoever_looks_first(make):
    """The second step needs nobody to wait: it begins when somebody asks."""
    tier = make(20 * BLOCK)
    slot = tier.allocate()
    write = AllOf([tier.write([slot], [unpackable(0)])])
    while not write.is_ready():
        pass
    assert not tier.is_encoded(slot)
