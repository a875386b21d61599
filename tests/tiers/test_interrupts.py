"""An interrupt at every line of every verb of every tier: none hangs, none loses a slot or a byte.

A caller who was interrupted mends the tier with `drain` and `keep_only`, and knows which slots it
holds: it notes a slot when `allocate` has returned, and forgets it before it calls `free`.
"""

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from interrupts import PACKAGE, interrupted_at
from tiers.test_contract import behind

from hf_tiered_cache.errors import ClosedCacheError
from hf_tiered_cache.tiers import Budget, DeviceTier, DiskTier, HostTier, Tier
from hf_tiered_cache.tiers.slots import SlotPool
from hf_tiered_cache.transfers import Transfer

BLOCK = 8192
NUM_SLOTS = 12
FILES = list((PACKAGE / "tiers").glob("*.py"))
HANG_SECONDS = 20

KINDS: dict[str, Callable[[Budget, Path], Tier]] = {
    "device": lambda budget, _: DeviceTier(BLOCK, budget),
    "host": lambda budget, _: HostTier(BLOCK, budget, slab_bytes=4 * BLOCK),
    "disk compiled": lambda budget, folder: DiskTier(
        BLOCK, budget, folder, mover="compiled", io="buffered"
    ),
    "disk python": lambda budget, folder: DiskTier(BLOCK, budget, folder, mover="python"),
    "disk behind a lane": lambda budget, folder: behind(
        DiskTier(BLOCK, budget, folder, io="buffered")
    ),
}


def content(seed: int) -> torch.Tensor:
    """uint8 [BLOCK], random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, generator=generator)


@dataclass
class Caller:
    """Somebody who holds slots of a tier, and knows what is in them."""

    tier: Tier
    held: dict[int, int | None] = field(default_factory=dict)  # slot -> seed of what it wrote there
    transfers: list[Transfer] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)  # memory of what is under way

    def allocate(self, num_slots: int = 1) -> None:
        for _ in range(num_slots):
            slot = self.tier.allocate()
            assert slot is not None and slot not in self.held
            self.held[slot] = None

    def write(self, *slots: int) -> None:
        self.held.update(dict.fromkeys(slots))
        data = [content(slot) for slot in slots]
        self.kept += data
        self.transfers.append(self.tier.write(slots, data))
        self.held.update({slot: slot for slot in slots})

    def read(self, *slots: int) -> None:
        out = [torch.zeros(BLOCK, dtype=torch.uint8) for _ in slots]
        self.kept += out
        self.transfers.append(self.tier.read(slots, out))

    def free(self, slot: int) -> None:
        del self.held[slot]
        self.tier.free(slot)

    def check_contents(self) -> None:
        for slot, seed in self.held.items():
            if seed is not None:
                out = torch.zeros(BLOCK, dtype=torch.uint8)
                self.tier.read([slot], [out]).wait()
                assert torch.equal(out, content(seed)), f"slot {slot} has other bytes"

    def mend_and_check(self) -> None:
        """Every slot and byte is there, and the tier works."""
        tier = self.tier
        for _ in range(2):
            tier.drain()
            tier.keep_only(self.held)
        assert all(transfer.is_ready() for transfer in self.transfers)
        assert tier.used_slots == len(self.held)
        assert tier.num_free() == NUM_SLOTS - len(self.held)
        assert tier.budget.used_bytes == tier.committed_bytes
        self.check_contents()
        self.allocate(NUM_SLOTS - len(self.held))
        assert tier.allocate() is None
        self.write(*sorted(self.held, reverse=True))
        self.check_contents()


def full(caller: Caller) -> None:
    caller.allocate(7)
    caller.write(0, 1, 2, 5)
    caller.transfers[-1].wait()


def reading(caller: Caller) -> None:
    full(caller)
    caller.read(5, 0, 1, 2)
    caller.write(3, 6)


VERBS: dict[str, tuple[Callable[[Caller], None], Callable[[Caller], None]]] = {
    # what comes before, what is interrupted
    "allocate": (lambda _: None, lambda caller: caller.allocate(3)),
    "allocate, retired": (
        lambda caller: (caller.allocate(NUM_SLOTS), caller.write(4, 9), caller.free(9)),
        lambda caller: caller.allocate(),
    ),
    "write": (full, lambda caller: caller.write(6, 3, 4)),
    "first write": (lambda caller: caller.allocate(4), lambda caller: caller.write(0, 3)),
    "read": (full, lambda caller: caller.read(5, 0, 1, 0)),
    "read what is being written": (
        lambda caller: (full(caller), caller.write(3, 4, 6)),
        lambda caller: (caller.read(3, 6), caller.transfers[-1].wait()),
    ),
    "wait": (reading, lambda caller: [transfer.wait() for transfer in caller.transfers]),
    "free": (reading, lambda caller: (caller.free(6), caller.free(4), caller.free(5))),
    "drain": (reading, lambda caller: caller.tier.drain()),
    "keep_only": (
        lambda caller: (reading(caller), caller.tier.drain(), caller.held.pop(5)),
        lambda caller: caller.tier.keep_only(caller.held),
    ),
}


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    """A hang is an error with a traceback."""

    def bark(*_: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def left(folder: Path) -> list[str]:
    """Threads of ours, Python's and the compiled core's, and open descriptors in `folder`."""
    found = [t.name for t in threading.enumerate() if t.name.startswith("hf_tiered_cache")]
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            found += [name] if name == "tiered-cache-io" else []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            found += [target] if target.startswith(str(folder)) else []
    return found


def assert_nothing_left(folder: Path, budget: Budget, where: str) -> None:
    deadline = time.monotonic() + 5
    while left(folder) and time.monotonic() < deadline:  # what was interrupted is not joined
        time.sleep(0.002)
    assert left(folder) == [], where
    assert budget.used_bytes == 0, where


def new_caller(kind: str, folder: Path) -> Caller:
    return Caller(KINDS[kind](Budget("tier", NUM_SLOTS * BLOCK), folder))


def interrupted_construction(kind: str, folder: Path, line: int) -> str:
    budget, made = Budget("tier", NUM_SLOTS * BLOCK), []
    with interrupted_at(line, FILES) as interruption:
        made.append(KINDS[kind](budget, folder))
    made.clear()
    gc.collect()
    assert_nothing_left(folder, budget, interruption.where)
    return interruption.where


def interrupted_close(kind: str, folder: Path, line: int) -> str:
    caller = new_caller(kind, folder)
    reading(caller)
    with interrupted_at(line, FILES) as interruption:
        caller.tier.close()
    caller.tier.close()
    assert_nothing_left(folder, caller.tier.budget, interruption.where)
    with pytest.raises(ClosedCacheError):
        caller.tier.allocate()
    assert all(transfer.is_ready() for transfer in caller.transfers), interruption.where
    return interruption.where


def interrupted_verb(kind: str, verb: str, folder: Path, line: int) -> str:
    caller = new_caller(kind, folder)
    before, what = VERBS[verb]
    before(caller)
    with interrupted_at(line, FILES) as interruption:
        what(caller)
    try:
        caller.mend_and_check()
    except BaseException as error:
        error.add_note(f"interrupted at {interruption.where}, line {line} of {verb!r}")
        raise
    caller.tier.close()
    assert_nothing_left(folder, caller.tier.budget, interruption.where)
    return interruption.where


def sweep(kind: str, folder: Path, step: int) -> int:
    """Interrupt every `step`-th line of everything; how many interrupts came."""
    num_interrupts = 0
    ways = {"construct": interrupted_construction, "close": interrupted_close}
    for verb in [*VERBS, *ways]:
        for line in range(1, 100_000, step):
            with watchdog():
                if verb in ways:
                    where = ways[verb](kind, folder, line)
                else:
                    where = interrupted_verb(kind, verb, folder, line)
            if not where:
                break
            num_interrupts += 1
        else:
            raise AssertionError(f"{verb} has no end")
    print(f"{kind}: {num_interrupts} interrupts, hung 0, lost 0")
    return num_interrupts


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_some_lines_loses_nothing(kind, tmp_path):
    assert sweep(kind, tmp_path, step=41) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_any_line_loses_nothing(kind, tmp_path):
    assert sweep(kind, tmp_path, step=1) > 150


@pytest.fixture
def no_gc_callbacks() -> Iterator[None]:
    """Hypothesis leaves one, in which Python swallows an interrupt as it does in a finalizer."""
    callbacks = list(gc.callbacks)
    gc.callbacks.clear()
    yield
    gc.callbacks.extend(callbacks)


@pytest.mark.usefixtures("no_gc_callbacks")
@pytest.mark.parametrize("kind", ["host", "disk compiled", "disk python"])
def test_ctrl_c_in_a_finalizer_is_not_lost_and_neither_is_the_rest(kind, tmp_path, monkeypatch):
    """Python swallows what a finalizer raises; it comes again when that is over."""
    callers, interrupts = [new_caller(kind, tmp_path)], []
    reading(callers[0])
    budget, transfers = callers[0].tier.budget, callers[0].transfers
    close = SlotPool.close

    def interrupted_once(pool: SlotPool) -> None:
        if not interrupts:
            interrupts.append(pool)
            raise KeyboardInterrupt
        close(pool)

    def drop() -> None:
        callers.clear()
        gc.collect()
        time.sleep(5)

    monkeypatch.setattr(SlotPool, "close", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        drop()
    assert len(interrupts) == 1
    assert all(transfer.is_ready() for transfer in transfers)
    gc.collect()
    assert_nothing_left(tmp_path, budget, "the finalizer")
