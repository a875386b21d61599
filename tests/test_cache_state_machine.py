"""Random sequences of operations: a `TieredCache` holds, bit for bit, what a `DynamicCache` holds.

`play` does every step to both and then compares everything that can be seen of them, the handles
of earlier updates included. Sequences that once failed stand below as tests of their own.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_tiered_cache import TieredCache
from hf_tiered_cache.errors import OutOfBlocksError
from hf_tiered_cache.integration.paged_states import PagedStates

BLOCK = 4096  # bytes of every block here, whatever its shape
MAX_BATCH = 6
MAX_FORKS = 3
MAX_HELD = 4
Bits = tuple[torch.Tensor, torch.Tensor]  # the keys and the values of one layer, as bytes


@dataclass(frozen=True)
class Setup:
    """The shapes and budgets of one sequence."""

    num_layers: int = 1
    batch: int = 1
    prompt: int = 0  # tokens in the first forward
    block_tokens: int = 4
    dims: tuple[int, int] = (8, 4)  # of keys and of values
    is_uneven: bool = False  # every second layer has other dims, so another manager
    dtype: torch.dtype = torch.float32
    device_blocks: int = 200
    disk_blocks: int = 1000
    staging_blocks: int = 2
    packing: str = "none"
    compares_always: bool = True  # else only after the last step: nothing is read in between

    def dims_of(self, layer: int) -> tuple[int, int]:
        key_dim, value_dim = self.dims
        return (key_dim, value_dim + 2) if self.is_uneven and layer % 2 else self.dims

    def make_cache(self, folder: Path) -> TieredCache:
        return TieredCache(
            device_bytes=self.device_blocks * BLOCK,
            disk_bytes=self.disk_blocks * BLOCK,
            staging_bytes=self.staging_blocks * BLOCK,
            disk_dir=folder,
            disk_io="buffered",
            block_tokens=self.block_tokens,
            packing=self.packing,
        )


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    num_layers, batch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    least = (num_layers + 2) * batch
    is_uneven = draw(st.integers(0, 3)) == 3
    sizes = st.one_of(
        st.integers(least - 1, least + 1),
        st.integers(least + 2, 2 * least),
        st.integers(least, 400),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    disk_blocks = draw(st.sampled_from([1000, 1000, 0, 15]))
    # What cannot be packed takes more, of which the few blocks of a small disk have not enough.
    may_pack = dtype == torch.bfloat16 and disk_blocks == 1000
    return Setup(
        num_layers=num_layers,
        batch=batch,
        prompt=draw(st.integers(0, 40)),
        block_tokens=draw(st.sampled_from([4, 8])),
        dims=draw(st.sampled_from([(8, 4), (2, 6)])),
        is_uneven=is_uneven,
        dtype=dtype,
        device_blocks=draw(sizes),
        disk_blocks=disk_blocks,
        staging_blocks=draw(st.sampled_from([2, 7])),
        packing=draw(st.sampled_from(["none", "bf16_12bit"])) if may_pack else "none",
        compares_always=draw(st.integers(0, 3)) < 3,
    )


# (name, which fork or handle, amount). What an amount means is the operation's own business.
Step = tuple[str, int, int]
STEP = st.tuples(
    st.sampled_from(
        ["update"] * 8
        + ["crop"] * 2
        + ["reorder", "repeat", "select", "fork", "fork", "close", "reset", "read"]
        + ["hold", "hold", "release"]
    ),
    st.integers(0, 3),
    st.integers(0, 255),
)
STEPS = st.integers(1, 14).flatmap(lambda n: st.lists(STEP, min_size=n, max_size=n))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Two NaNs are the same here only if they are the same bytes."""
    dense = tensor.materialize() if isinstance(tensor, PagedStates) else tensor
    return dense.contiguous().view(torch.uint8)


def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(bits(mine), bits(theirs))


@dataclass
class Twins:
    """A TieredCache and a DynamicCache to which the same was done."""

    tiered: TieredCache
    dense: DynamicCache

    @property
    def batch(self) -> int:
        """Sequences held; 0 before the first update."""
        layers = self.dense.layers
        return layers[0].keys.shape[0] if layers and layers[0].is_initialized else 0

    def fork(self) -> "Twins":
        return Twins(copy.deepcopy(self.tiered), copy.deepcopy(self.dense))

    def update(self, setup: Setup, batch: int, num_tokens: int, noise: torch.Generator) -> None:
        """One forward's tokens to every layer; nothing at all where a layer has no room."""
        states = [
            random_states(setup, layer, batch, num_tokens, noise) for layer in range_of(setup)
        ]
        try:
            for layer, (keys, values) in enumerate(states):
                given = keys.clone(memory_format=torch.preserve_format), values.clone()
                self.tiered.update(*given, layer)
                for tensor in given:
                    tensor.zero_()  # the caller's tensors are the caller's
        except OutOfBlocksError:
            self.check_refusal(setup, batch, num_tokens)
            return
        for layer, (keys, values) in enumerate(states):
            self.dense.update(keys, values, layer)

    def check_refusal(self, setup: Setup, batch: int, num_tokens: int) -> None:
        """No room is no excuse where the device has it. (Room that blocks of one shape had stays
        theirs, so of two shapes nothing can be said.)"""
        if setup.is_uneven:
            return
        used = sum(one.device_tier.used_slots for one in self.tiered._owned.pool.managers)
        staging = max(2 * MAX_BATCH, setup.staging_blocks)
        columns = num_tokens // setup.block_tokens + 2
        assert used + staging + setup.num_layers * batch * columns > setup.device_blocks

    def do(self, name: str, *arguments: Any) -> None:
        """Call a method of both."""
        getattr(self.tiered, name)(*arguments)
        getattr(self.dense, name)(*arguments)

    def check(self) -> None:
        tiered, dense = self.tiered, self.dense
        assert tiered.get_seq_length() == dense.get_seq_length()
        assert tiered.is_initialized == dense.is_initialized
        if self.batch:
            assert tiered.batch_size == self.batch
        assert len(tiered) >= len(dense)  # an update that failed may have made empty layers
        for index, mine in enumerate(tiered.layers):
            assert tiered.get_seq_length(index) == dense.get_seq_length(index)
            assert tiered.get_mask_sizes(3, index) == dense.get_mask_sizes(3, index)
            assert tiered.get_query_offset(index) == dense.get_query_offset(index)
            theirs = dense.layers[index] if index < len(dense) else None
            if theirs is None or theirs.keys is None:
                assert mine.get_seq_length() == 0
            else:
                assert_same(mine.keys, theirs.keys)
                assert_same(mine.values, theirs.values)


@dataclass
class Held:
    """Handles that somebody keeps, and the dense tensors they must always stand for."""

    owner: Twins
    handles: list[PagedStates]
    dense: list[torch.Tensor]

    @classmethod
    def of(cls, twins: Twins, layer: int) -> "Held":
        mine, theirs = twins.tiered.layers[layer], twins.dense.layers[layer]
        return cls(twins, [mine.keys, mine.values], [theirs.keys.clone(), theirs.values.clone()])

    def check(self) -> None:
        for handle, dense in zip(self.handles, self.dense, strict=True):
            assert_same(handle, dense)


@dataclass
class Player:
    """All forks of one cache and the handles kept of them."""

    setup: Setup
    forks: list[Twins]
    held: list[Held] = field(default_factory=list)
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def step(self, name: str, which: int, amount: int) -> None:
        twins = self.forks[which % len(self.forks)]
        length = twins.dense.get_seq_length()
        batch = twins.batch
        if name == "update":
            num_tokens = 1 + amount % (4 * self.setup.block_tokens)
            twins.update(self.setup, batch or 1 + amount % 4, num_tokens, self.noise)
        elif name == "crop":
            # A few tokens, any number of them, all and more.
            few, any_number = amount % 12, amount % (length + 1)
            count = few if amount < 80 else any_number if amount < 230 else length + amount - 230
            twins.do("crop", -count)
        elif name == "reset":
            # The base class of transformers' layers zeroes the tensors and keeps their length, but
            # `DynamicLayer.reset` drops them: `keys` is None again, the length 0, and the next
            # update may bring another batch. So both are compared as new ones, and `update` above
            # draws a batch where there is none.
            if amount % 3 == 2:
                twins.do("reset")
        elif name == "fork":
            if len(self.forks) < MAX_FORKS:
                self.forks.append(twins.fork())
        elif name == "close":
            if len(self.forks) > 1:
                self._drop(twins, is_explicit=bool(amount % 2))
        elif name == "release":
            del self.held[which : which + 1]
        elif batch == 0:
            return  # what follows needs rows
        elif name == "hold":
            self.held = [*self.held, Held.of(twins, amount % self.setup.num_layers)][-MAX_HELD:]
        elif name == "read":
            mine = twins.tiered.layers[amount % self.setup.num_layers]
            theirs = twins.dense.layers[amount % self.setup.num_layers]
            assert torch.equal(
                mine.values[:, -1, : 1 + which].view(torch.uint8),
                theirs.values[:, -1, : 1 + which].contiguous().view(torch.uint8),
            )
        elif name == "reorder":
            twins.do("reorder_cache", torch.tensor(rows_of(amount, batch)))
        elif name == "repeat":
            repeats = min(1 + amount % 3, MAX_BATCH // batch)
            twins.do("batch_repeat_interleave", repeats)
        elif name == "select":
            twins.do("batch_select_indices", indices_of(which, amount, batch))
        else:
            raise AssertionError(name)

    def _drop(self, twins: Twins, is_explicit: bool) -> None:
        """Close a fork, or leave it to the garbage collector; its handles go with it."""
        self.held = [held for held in self.held if held.owner is not twins]
        self.forks.remove(twins)
        if is_explicit:
            twins.tiered.close()

    def check(self) -> None:
        for twins in self.forks:
            twins.check()
        for held in self.held:
            held.check()
        self.check_integrity()

    def check_integrity(self) -> None:
        for manager in self.forks[0].tiered._owned.pool.managers:
            manager.device_tier.poison = True  # from now on a freed block reads as NaN
            manager.check_integrity()
            for tier in manager.tiers:
                assert tier.budget.used_bytes <= tier.budget.peak_bytes <= tier.budget.limit_bytes


def range_of(setup: Setup) -> range:
    return range(setup.num_layers)


def random_states(
    setup: Setup, layer: int, batch: int, num_tokens: int, noise: torch.Generator
) -> Bits:
    """Keys and values of random bytes, NaNs and infinities among them, transposed as models do."""
    size = setup.dtype.itemsize
    keys, values = (
        torch.randint(256, (batch, num_tokens, 2, dim * size), generator=noise, dtype=torch.uint8)
        .view(setup.dtype)
        .transpose(1, 2)
        for dim in setup.dims_of(layer)
    )
    return keys, values


def rows_of(amount: int, batch: int) -> list[int]:
    """`batch` rows, with repeats."""
    return [(amount >> 2 * (row % 4)) % 4 % batch for row in range(batch)]


def indices_of(kind: int, amount: int, batch: int) -> Any:
    """Some rows, in one of the ways in which a dimension of a tensor can be indexed."""
    rows = rows_of(amount, batch)[: 1 + amount % batch]
    if kind == 0:
        return torch.tensor(rows)
    if kind == 1:
        return [row - batch for row in rows]
    if kind == 2:
        return torch.tensor([row in rows for row in range(batch)])
    return slice(min(rows), None, 1 + amount % 2)


def play(folder: Path, setup: Setup, steps: list[Step]) -> None:
    """Do the steps; after each of them both caches agree, and at the end nothing is left over."""
    player = Player(setup, [Twins(setup.make_cache(folder), DynamicCache())])
    pool = player.forks[0].tiered._owned.pool
    try:
        if setup.prompt:
            player.forks[0].update(setup, setup.batch, setup.prompt, player.noise)
        for number, step in enumerate(steps, 1):
            player.step(*step)
            if setup.compares_always or number == len(steps):
                player.check()
            else:
                player.check_integrity()
        player.held.clear()
        for twins in player.forks:
            twins.tiered.reset()
        for manager in pool.managers:
            manager.check_integrity()
            assert not manager.blocks.num_clean + manager.blocks.num_dirty
            assert manager.device_tier.used_slots <= manager.num_staging_slots
            assert [tier.used_slots for tier in manager.tiers[1:]] in ([], [0])
    finally:
        for twins in player.forks:
            twins.tiered.close()


def sequences(max_examples: int) -> Any:
    """Run a test with so many random (setup, steps)."""

    def decorate(test: Any) -> Any:
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        run = settings(max_examples=max_examples, deadline=None, suppress_health_check=checks)
        return run(given(setup=setups(), steps=STEPS)(test))

    return decorate


@sequences(250)
def test_any_sequence_of_operations_leaves_what_a_dynamic_cache_holds(tmp_path, setup, steps):
    play(tmp_path, setup, steps)


@pytest.mark.slow
@sequences(5000)
def test_thousands_of_sequences_leave_what_a_dynamic_cache_holds(tmp_path, setup, steps):
    play(tmp_path, setup, steps)


# --- sequences that failed -----------------------------------------------------------------------


def test_a_first_forward_without_room_leaves_a_new_cache(tmp_path):
    """The first layer had room, the second not: both are as before, also for another batch."""
    setup = Setup(num_layers=2, batch=2, device_blocks=6)
    with setup.make_cache(tmp_path) as cache:
        noise = torch.Generator().manual_seed(0)
        cache.update(*random_states(setup, 0, 2, 1, noise), 0)
        with pytest.raises(OutOfBlocksError):
            cache.update(*random_states(setup, 1, 2, 1, noise), 1)
        assert [layer.is_initialized for layer in cache.layers] == [False] * len(cache)
        for layer in range(2):
            cache.update(*random_states(setup, layer, 1, 1, noise), layer)


def test_layers_of_two_shapes_share_a_small_device(tmp_path):
    setup = Setup(num_layers=2, batch=2, is_uneven=True, device_blocks=8, prompt=2)
    play(tmp_path, setup, [("update", 0, 6)])


@pytest.mark.parametrize("device_blocks", [8, 60])
def test_a_fork_and_its_original_fill_the_block_they_share(tmp_path, device_blocks):
    """Each into its own copy, also where the shared block had been cropped out of a cold one."""
    setup = Setup(device_blocks=device_blocks, prompt=38)
    steps = [("crop", 0, 11), ("fork", 0, 0), ("update", 0, 2), ("update", 1, 4), ("update", 0, 9)]
    play(tmp_path, setup, steps)


def test_handles_outlive_whatever_happens_to_rows(tmp_path):
    setup = Setup(num_layers=2, batch=3, device_blocks=60, prompt=33)
    changes = [("reorder", 0, 6), ("select", 0, 1), ("repeat", 0, 2), ("crop", 0, 255)]
    steps = [step for change in changes for step in (("hold", 0, 1), change, ("update", 0, 5))]
    play(tmp_path, setup, [*steps, ("reset", 0, 2), ("update", 0, 3)])
