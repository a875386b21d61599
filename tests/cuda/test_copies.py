"""Copies between slots: whole, and each run the way its size asks for."""

import random

import pytest
import torch

KIB = 1 << 10
DIRECTIONS = ["HOST_TO_DEVICE", "DEVICE_TO_HOST", "DEVICE_TO_DEVICE"]


def copy(core, target, source, pieces, direction="HOST_TO_DEVICE", stream=1, is_pinned=True):
    """Copy (target offset, source offset, bytes) pieces between two byte tensors; what was used:
    (single copies, batches, pieces in batches)."""
    core.take_copies()
    core.module.copy(
        device=0,
        stream=stream,
        targets=[target.data_ptr() + to for to, _, _ in pieces],
        sources=[source.data_ptr() + begin for _, begin, _ in pieces],
        num_bytes=[num_bytes for _, _, num_bytes in pieces],
        direction=getattr(core.module.CopyDirection, direction),
        is_pinned=is_pinned,
    )
    for to, begin, num_bytes in pieces:
        assert torch.equal(target[to : to + num_bytes], source[begin : begin + num_bytes])
    return core.take_copies()


@pytest.fixture
def memory():
    """(target, source) of 8 MiB."""
    source = torch.randint(0, 256, (8 << 20,), dtype=torch.uint8)
    return torch.zeros_like(source), source


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_neighbours_on_both_sides_become_one_run(core, memory, direction):
    blocks = [(slot * 256 * KIB, (slot + 3) * 256 * KIB, 256 * KIB) for slot in range(4)]
    assert copy(core, *memory, blocks, direction) == (1, 0, 0)  # 1 MiB in one piece


def test_neighbours_are_found_in_whatever_order_they_come(core, memory):
    """Slots are handed out in any order; a call for each block is what costs."""
    order = [5, 2, 0, 7, 1, 6, 3]  # 0 to 3 and 5 to 7
    blocks = [(slot << 20, slot << 20, 1 << 20) for slot in order]
    assert copy(core, *memory, blocks) == (0, 1, 2)


def test_blocks_of_a_mebibyte_go_in_one_batch(core, memory):
    blocks = [((3 - slot) << 20, slot << 20, 1 << 20) for slot in range(4)]
    assert copy(core, *memory, blocks) == (0, 1, 4)


@pytest.mark.parametrize("error", [36, 801])  # newer driver required, not supported
def test_a_driver_without_batches_copies_one_by_one(core, memory, error):
    blocks = [((3 - slot) << 20, slot << 20, 1 << 20) for slot in range(4)]
    core.refuse_batches(error)
    try:
        assert copy(core, *memory, blocks) == (4, 0, 0)
        assert core.exports.emulation_take_error() == 0, "left for the next caller of CUDA"
    finally:
        core.refuse_batches(0)


def test_any_other_error_of_a_batch_is_told(core, memory):
    blocks = [((3 - slot) << 20, slot << 20, 1 << 20) for slot in range(4)]
    core.refuse_batches(700)
    try:
        with pytest.raises(RuntimeError, match="CUDA error 700"):
            copy(core, *memory, blocks)
    finally:
        core.refuse_batches(0)


def test_neighbours_on_one_side_only_stay_apart(core, memory):
    blocks = [(slot * 64 * KIB, slot * 128 * KIB, 64 * KIB) for slot in range(4)]
    assert copy(core, *memory, blocks) == (0, 1, 4)
    blocks = [(slot * 128 * KIB, slot * 64 * KIB, 64 * KIB) for slot in range(4)]
    assert copy(core, *memory, blocks) == (0, 1, 4)


def test_the_legacy_default_stream_takes_no_batch(core, memory):
    blocks = [(slot * 64 * KIB, slot * 128 * KIB, 64 * KIB) for slot in range(4)]
    assert copy(core, *memory, blocks, stream=0) == (4, 0, 0)


@pytest.mark.parametrize("num_bytes", [16, 17, 4096, 28 * KIB - 1])
def test_small_pieces_go_by_a_kernel(core, memory, num_bytes):
    blocks = [(slot * 29 * KIB, (199 - slot) * 29 * KIB, num_bytes) for slot in range(200)]
    assert copy(core, *memory, blocks) == (0, 0, 0)


def test_small_pieces_of_pageable_memory_do_not_go_by_a_kernel(core, memory):
    blocks = [(slot * 29 * KIB, slot * 58 * KIB, 4096) for slot in range(100)]
    assert copy(core, *memory, blocks, is_pinned=False) == (100, 0, 0)


def test_pieces_of_all_sizes_in_one_call(core, memory):
    draw = random.Random(0)
    pieces, to, begin = [], 0, 0
    for num_bytes in [0, 5, 1 << 20, 28 * KIB, 16 * KIB, 100, 2 << 20, 300 * KIB, 64 * KIB]:
        to += draw.randrange(64)
        begin += draw.randrange(64)
        pieces.append((to, begin, num_bytes))
        to += num_bytes
        begin += num_bytes
    assert copy(core, *memory, pieces) == (0, 1, 5)


def test_nothing_to_copy(core, memory):
    assert copy(core, *memory, []) == (0, 0, 0)


def test_lists_of_different_lengths_are_refused(core):
    with pytest.raises(ValueError, match="differ in length"):
        core.module.copy(0, 1, [0], [0, 0], [1], core.module.CopyDirection.HOST_TO_DEVICE, True)


def test_what_is_refused_as_invalid_is_copied_piece_by_piece(core, memory):
    """As copies are that cross from one registered range into the next."""
    blocks = [((7 - slot // 2 * 2 + slot % 2) << 18, slot << 18, 1 << 18) for slot in range(4)]
    core.refuse_batches(1)
    try:
        assert copy(core, *memory, blocks) == (4, 0, 0)
    finally:
        core.refuse_batches(0)


def test_memory_that_is_not_pinned_goes_run_by_run(core, memory):
    blocks = [((3 - slot) << 18, slot << 18, 1 << 18) for slot in range(4)]
    assert copy(core, *memory, blocks, is_pinned=False) == (4, 0, 0)


@pytest.mark.parametrize("num_bytes", [4, 4096, 16896, 3 * 4096 + 20])
def test_a_little_is_posted_by_a_kernel(core, memory, num_bytes):
    target, source = memory
    core.take_copies()
    core.module.post(0, 1, target.data_ptr(), source.data_ptr(), num_bytes)
    assert torch.equal(target[:num_bytes], source[:num_bytes])
    assert not target[num_bytes:].any()
    assert core.take_copies() == (0, 0, 0)
