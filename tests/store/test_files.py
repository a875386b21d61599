"""A block file is what was written, or it is refused: nothing in between."""

import os
import random
import stat
import struct
from pathlib import Path

import pytest
import xxhash
from data.make_store_golden import block, golden_file

from hf_tiered_cache.errors import TierIOError
from hf_tiered_cache.store import files
from hf_tiered_cache.store.files import BlockFileError, NewBlock

DATA = Path(__file__).parents[1] / "data"
GOLDEN = (DATA / "store_block_v1.htc").read_bytes()
HEADER, PAYLOADS = block()
# Offsets of header fields, as the format says.
MAJOR, HEADER_LEN, FILE_LEN, CODEC, EXTENTS, KEY, SPACE = 8, 12, 16, 24, 28, 32, 96
TABLE = 148


@pytest.fixture
def root(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd, tmp_path
    os.close(fd)


def put(root, data=None):
    """The golden block under its name, or other bytes there."""
    fd, folder = root
    with NewBlock(fd, HEADER, PAYLOADS) as new:
        assert new.publish()
    path = folder / new.path
    if data is not None:
        path.write_bytes(data)
    return path


def read(root):
    """All its bytes, if it is taken for good."""
    fd, folder = root
    block = files.open_block(fd, str(folder), HEADER.space, HEADER.key)
    try:
        return [block.read(extent) for extent in block.header.extents]
    finally:
        block.close()


def test_what_is_written_is_read(root):
    put(root)
    assert read(root) == PAYLOADS


def test_the_format_is_that_of_the_golden_file(root):
    """Made by the first version; every later one must read it."""
    assert golden_file() == GOLDEN
    put(root, GOLDEN)
    assert read(root) == PAYLOADS


def test_every_flipped_bit_that_is_read_is_found(root):
    path = put(root)
    rng = random.Random(0)
    header_bits = rng.sample(range(4096 * 8), 600)
    bits = {*header_bits, *(rng.randrange(len(GOLDEN) * 8) for _ in range(400))}
    for bit in sorted(bits):
        damaged = bytearray(GOLDEN)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(BlockFileError):
            read(root)


@pytest.mark.parametrize("length", [0, 1, 100, 4095, 4096, 8192, len(GOLDEN) - 1, len(GOLDEN) - 32])
def test_a_truncated_file_is_refused(root, length):
    put(root, GOLDEN[:length])
    with pytest.raises(BlockFileError):
        read(root)


def test_a_longer_file_a_hole_and_swapped_sectors_are_refused(root):
    for data in (
        GOLDEN + b"\0",
        GOLDEN + GOLDEN,
        GOLDEN[:4096] + bytes(4096) + GOLDEN[8192:],
        GOLDEN[:4096] + GOLDEN[8192:12288] + GOLDEN[4096:8192] + GOLDEN[12288:],
        GOLDEN[:512] + GOLDEN[:512] + GOLDEN[1024:],
        bytes(len(GOLDEN)),
    ):
        path = put(root, data)
        with pytest.raises(BlockFileError):
            read(root)
        path.unlink()


def sealed(changes):
    """The golden file with header fields changed and its checksums made right again."""
    data = bytearray(GOLDEN)
    for offset, form, value in changes:
        struct.pack_into(f"<{form}", data, offset, value)
    length = struct.unpack_from("<I", data, HEADER_LEN)[0]
    if 4096 <= length <= len(data):
        data[length - 16 : length] = xxhash.xxh3_128_digest(bytes(data[: length - 16]))
        data[-16:] = data[length - 16 : length]
    return bytes(data)


HOSTILE = {
    "another magic": [(0, "8s", b"\x89PNG\r\n\x1a\n")],
    "a later format": [(MAJOR, "H", 2)],
    "format 0": [(MAJOR, "H", 0)],
    "no header": [(HEADER_LEN, "I", 0)],
    "a small header": [(HEADER_LEN, "I", 64)],
    "an uneven header": [(HEADER_LEN, "I", 4097)],
    "a header as long as can be": [(HEADER_LEN, "I", 2**32 - 1)],
    "a header over the cap": [(HEADER_LEN, "I", 128 * 1024)],
    "a file of 2^63": [(FILE_LEN, "Q", 2**63)],
    "a file of -1": [(FILE_LEN, "Q", 2**64 - 1)],
    "an unknown codec": [(CODEC, "H", 7)],
    "no extents": [(EXTENTS, "I", 0)],
    "an extent too many": [(EXTENTS, "I", 3)],
    "an extent too few": [(EXTENTS, "I", 1)],
    "2^32 - 1 extents": [(EXTENTS, "I", 2**32 - 1)],
    "more extents than a header holds": [(EXTENTS, "I", 4096)],
    "another key": [(KEY, "32s", bytes(32))],
    "another namespace": [(SPACE, "32s", bytes(32))],
    "an extent in the header": [(TABLE + 24, "Q", 0)],
    "an extent behind the end": [(TABLE + 24, "Q", 2**63)],
    "an extent at -1": [(TABLE + 24, "Q", 2**64 - 1)],
    "an uneven extent": [(TABLE + 24, "Q", 4097)],
    "extents that overlap": [(TABLE + 64 + 24, "Q", 4096)],
    "an empty extent": [(TABLE + 32, "Q", 0), (TABLE + 40, "Q", 0)],
    "an extent of 2^64 - 4096": [(TABLE + 32, "Q", 2**64 - 4096), (TABLE + 40, "Q", 2**64 - 4096)],
    "stored and raw bytes that differ": [(TABLE + 40, "Q", 2**40)],
    "another checksum": [(TABLE + 48, "16s", bytes(16))],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_refused_before_it_is_believed(root, what):
    put(root, sealed(HOSTILE[what]))
    with pytest.raises(BlockFileError) as refused:
        read(root)
    assert isinstance(refused.value, TierIOError)


def test_the_sealing_itself_is_right(root):
    """Else the hostile headers were refused for their checksum alone."""
    put(root, sealed([(132, "I", 1)]))
    assert read(root) == PAYLOADS


def test_random_bytes_crash_nothing():
    rng = random.Random(1)
    for _ in range(3000):
        data = bytearray(GOLDEN[:4096])
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(220)] = rng.randrange(256)
        data[4080:] = xxhash.xxh3_128_digest(bytes(data[:4080]))
        try:
            files.parse(bytes(data), len(GOLDEN))
        except BlockFileError:
            continue


def test_links_other_kinds_and_writable_files_are_refused(root):
    path = put(root)
    copy = path.with_name("copy")
    os.link(path, copy)
    with pytest.raises(BlockFileError, match="2 names"):
        read(root)
    path.unlink()
    path.symlink_to(copy)
    with pytest.raises(BlockFileError, match="symbolic link"):
        read(root)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BlockFileError, match="regular"):
        read(root)
    path.unlink()
    os.rename(copy, path)
    path.chmod(0o620)
    with pytest.raises(BlockFileError, match="others may write"):
        read(root)
    path.chmod(0o600)
    assert read(root) == PAYLOADS


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_nobody_else_can_read_it(root, umask):
    before = os.umask(umask)
    try:
        path = put(root)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if umask != 0o777:
        for folder in list(path.parents)[:4]:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_second_writer_of_a_key_finds_the_work_done(root):
    put(root)
    with NewBlock(root[0], HEADER, PAYLOADS) as new:
        assert not new.publish()
    assert read(root) == PAYLOADS


def test_what_is_not_published_leaves_nothing(root):
    NewBlock(root[0], HEADER, PAYLOADS).close()
    assert [path for path in root[1].rglob("*") if path.is_file()] == []


def test_file_systems_without_unnamed_files(root, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "not supported")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    new = NewBlock(root[0], HEADER, PAYLOADS)
    assert len([path for path in root[1].rglob("*") if path.is_file()]) == 1
    new.close()
    assert [path for path in root[1].rglob("*") if path.is_file()] == []
    path = put(root)
    assert [one for one in root[1].rglob("*") if one.is_file()] == [path]
    assert read(root) == PAYLOADS
