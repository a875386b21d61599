"""A device that lags behind, and its copy lane, in virtual time on the CPU.

What the device is given (kernels, copies) goes into three queues; nothing happens until somebody
waits or looks. Which queue goes on is drawn from a seed; only what was said holds them back, so a
wait that was forgotten shows: what is loaded reads as NaN from the moment its slot may be filled
until the copy is done. So does every slot of the device that was never written, and every slot of
the host that was freed.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

from hf_tiered_cache.kernels import ops
from hf_tiered_cache.observe.metrics import LaneCounters
from hf_tiered_cache.tiers import DeviceTier, HostTier, MemoryTier
from hf_tiered_cache.transfers import Transfer

POISON = 0xFF
KERNELS = [
    (ops, "append_tokens"),
    (ops, "attend_blocks"),
    (ops, "finish_attention"),
    (ops, "join_states"),
    (ops, "paged_attention"),
    (DeviceTier, "copy_block"),
]
WAITED_FOR = ("finish_attention", "paged_attention")  # the model goes on with what they give


@dataclass(eq=False)
class Step:
    """Something a queue does, after others."""

    perform: Callable[[], object]
    after: list["Step"]
    is_done: bool = False
    result: object = None


@dataclass(eq=False)
class Queue:
    """Steps in order. `holds`: what the next step that is given comes after."""

    steps: deque[Step] = field(default_factory=deque)
    holds: list[Step] = field(default_factory=list)
    last: Step | None = None

    def give(self, perform: Callable[[], object], after: Sequence[Step] = ()) -> Step:
        self.last = Step(perform, [*after, *self.holds])
        self.holds = []
        self.steps.append(self.last)
        return self.last


class LateDevice:
    """Three queues that overtake one another wherever nothing holds them back."""

    def __init__(self, seed: int = 0, speed: float = 0.3) -> None:
        """speed: the chance that one step is done when somebody looks."""
        self.random = random.Random(seed)
        self.speed = speed
        self.compute, self.loads, self.stores = Queue(), Queue(), Queue()
        self.is_performing = False
        self.num_steps = self.num_overtakings = 0

    def tick(self) -> None:
        """Somebody looked."""
        if self.random.random() < self.speed:
            self.go_on()

    def go_on(self) -> bool:
        """Do one step, whichever can be done; False when there is none."""
        queues = (self.compute, self.loads, self.stores)
        ready = [q for q in queues if q.steps and all(step.is_done for step in q.steps[0].after)]
        if not ready:
            assert not any(q.steps for q in queues), "the queues wait for one another"
            return False
        queue = self.random.choice(ready)
        self.num_overtakings += queue is not self.compute and bool(self.compute.steps)
        step = queue.steps.popleft()
        self.is_performing = True
        try:
            step.result = step.perform()
        finally:
            self.is_performing = False
        step.is_done = True
        self.num_steps += 1
        return True

    def finish(self, step: Step) -> object:
        """Go on until a step is done."""
        while not step.is_done:
            assert self.go_on(), "a step that nobody was given"
        return step.result

    @contextmanager
    def computing(self):
        """Let the kernels, and copies between slots, be given to this device."""
        with ExitStack() as stack:
            for where, name in KERNELS:
                function = self._deferred(getattr(where, name), name in WAITED_FOR)
                stack.enter_context(patch.object(where, name, function))
            yield

    def _deferred(self, function, is_waited_for: bool):
        def given(*args, **kwargs):
            if self.is_performing:
                return function(*args, **kwargs)
            step = self.compute.give(lambda: function(*args, **kwargs))
            return self.finish(step) if is_waited_for else None

        return given


@contextmanager
def poisoned(kind: type[MemoryTier]):
    """Let every slot of a tier read as NaN when it is freed: nobody may be reading it."""
    init = kind.__init__

    def init_poisoned(tier, *args, **kwargs):
        init(tier, *args, **kwargs)
        tier.poison = True

    with patch.object(kind, "__init__", init_poisoned):
        yield


class LateMark:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._step = device.compute.last

    def hold_loads(self) -> None:
        if self._step is not None:
            self._device.loads.holds.append(self._step)


class LateCopy(Transfer):
    """Goes on when it is looked at."""

    __slots__ = ("_device", "_step")

    def __init__(self, device: LateDevice, step: Step) -> None:
        super().__init__()
        self._device = device
        self._step = step

    def is_ready(self) -> bool:
        if not self._is_ready:
            self._device.tick()
            if self._step.is_done:
                self.end_part()
        return self._is_ready

    def wait(self) -> None:
        self._device.finish(self._step)
        if not self._is_ready:
            self.end_part()
        super().wait()

    def hold_device(self) -> None:
        self._device.compute.holds.append(self._step)


class LateLane:
    """The copy lane of a `LateDevice`."""

    def __init__(self, device: LateDevice) -> None:
        self.device = device
        self.slabs: list[torch.Tensor] = []
        self.counters = LaneCounters()
        self.num_loads = self.num_stores = self.occupied_bytes = 0

    @contextmanager
    def serving(self):
        """Take the memory of every device tier made meanwhile for the device's."""
        init = DeviceTier.__init__

        def noted(tier, *args, **kwargs):
            init(tier, *args, **kwargs)
            self.slabs.append(tier.slab.fill_(POISON))

        with patch.object(DeviceTier, "__init__", noted), poisoned(HostTier):
            yield

    def carries(self, block: torch.Tensor) -> bool:
        return any(0 <= block.data_ptr() - slab.data_ptr() < slab.numel() for slab in self.slabs)

    def mark(self) -> LateMark:
        return LateMark(self.device)

    def load_rows(self, source, rows, target, target_rows) -> Transfer:
        return self.load([source[row] for row in rows], [target[row] for row in target_rows])

    def load(self, sources, targets, is_pinned=True) -> Transfer:
        self.num_loads += len(sources)
        sources, targets = list(sources), list(targets)
        assert all(map(self.carries, targets))

        def begin() -> None:
            for target in targets:
                target.fill_(POISON)

        def end() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        self.device.loads.give(begin)
        self.counters.moved_bytes += sum(target.numel() for target in targets)
        return LateCopy(self.device, self.device.loads.give(end))

    def store(self, sources, targets, is_pinned=True) -> Transfer:
        self.num_stores += len(sources)
        sources, targets = list(sources), list(targets)
        assert all(map(self.carries, sources))

        def copy() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        given = self.device.compute.last
        step = self.device.stores.give(copy, [given] if given else [])
        return LateCopy(self.device, step)

    def settle(self) -> None:
        while self.device.go_on():
            pass

    def settle_device(self) -> None:
        self.settle()

    def probe(self, pinned, target) -> float:
        self.counters.probed_rate = 1e9
        return 1e9

    def occupy(self, pinned, target, num_bytes) -> None:
        self.occupied_bytes += num_bytes

    def measure(self) -> LaneCounters:
        return self.counters


class RefusingPinning:
    """Pins the first so many ranges and refuses the others."""

    def __init__(self, num_ranges: int = 10**6) -> None:
        self.num_left = num_ranges
        self.pinned: set[int] = set()

    def register(self, address: int, num_bytes: int) -> bool:
        if not self.num_left:
            return False
        self.num_left -= 1
        self.pinned.add(address)
        return True

    def unregister(self, address: int) -> None:
        self.pinned.remove(address)


class LateFlags:
    """Flags that a `LateDevice` raises and waits for in its own order; see `DeviceFlags`."""

    def __init__(self, device: LateDevice) -> None:
        self.device = device
        self.words: dict[int, torch.Tensor] = {}

    def mailbox(self, num_bytes: int) -> torch.Tensor:
        memory = torch.zeros(max(num_bytes, 1), dtype=torch.uint8)[:num_bytes]
        if num_bytes == 8:
            words = memory.view(torch.int32)
            self.words = {words[i].data_ptr(): words[i] for i in range(2)}
        return memory

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.device.compute.give(lambda: target.copy_(source))

    def raise_flag(self, address: int, value: int) -> None:
        self.device.compute.give(lambda: self.words[address].fill_(value))

    def wait_for_flag(self, address: int, value: int) -> None:
        def spin() -> None:
            while int(self.words[address]) < value:
                pass

        self.device.compute.give(spin)

    def wait_seconds(self) -> float:
        return 0.0
