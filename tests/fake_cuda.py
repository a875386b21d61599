"""A GPU for tests without one: torch's streams and events played on the CPU, where everything is
done at once, and the CUDA core emulated. Every line that a GPU would run is run, but no races show;
those are for `late_lane`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from types import ModuleType
from unittest.mock import patch

import emulated
import torch
from tiers.late_lane import RefusingPinning

from hf_tiered_cache.devices import CpuDevice, Device
from hf_tiered_cache.devices.cuda_lane import CudaFlags, CudaLane
from hf_tiered_cache.devices.in_place import InPlaceAttention
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.loader import default_kernel
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers import DeviceTier

GPU = torch.device("cpu", 0)  # has an index, as a GPU has


class FakeEvent:
    """A moment: the number of the stream's last work."""

    clock = count(1)

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.at: int | None = None

    def record(self, stream: "FakeStream") -> None:
        self.at = next(self.clock)
        stream.seen.append(("record", self.at))

    def query(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        assert self.at is not None, "waited for a moment that was never set"

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.enable_timing and end.enable_timing
        assert self.at is not None and end.at is not None
        return float(end.at - self.at)


class FakeStream:
    """A stream that notes what it was told."""

    handles = count(17)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda_stream = next(self.handles)
        self.seen: list[tuple[str, int | None]] = []

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        assert event.at is not None, "waits for a moment that was never set: CUDA would not wait"
        self.seen.append(("wait", event.at))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.seen.append(("synchronize", None))


class FakeLane(CudaLane):
    """The copy lane, over memory of the CPU that it is told to take for the device's."""

    slabs: list[torch.Tensor]

    def carries(self, block: torch.Tensor) -> bool:
        return any(0 <= block.data_ptr() - slab.data_ptr() < slab.numel() for slab in self.slabs)


class FakeGpu:
    """What a test may look at."""

    def __init__(self, module: ModuleType | None) -> None:
        self.module = module
        self.stream = FakeStream(GPU)
        self.pinning = RefusingPinning()
        self.lanes: list[FakeLane] = []
        self.slabs: list[torch.Tensor] = []
        self.flags: list[CudaFlags] = []
        self.group_columns: Callable[[BlockLayout], int] = lambda _: 1

    def kind(self) -> type[Device]:
        """The CPU as this GPU."""
        gpu = self

        class FakeCuda(CpuDevice):
            pinning = gpu.pinning

            def __init__(self, torch_device: torch.device) -> None:
                super().__init__(torch_device)
                self.copy_lane, self.in_place = gpu.make_lane(), gpu.make_cpu_lane()

            def group_columns(self, layout: BlockLayout) -> int:
                return gpu.group_columns(layout)

        return FakeCuda

    def make_lane(self) -> FakeLane:
        self.lanes.append(FakeLane(GPU, self.module))
        self.lanes[-1].slabs = self.slabs
        return self.lanes[-1]

    def make_cpu_lane(self) -> InPlaceAttention | None:
        if self.module is None:
            return None
        self.flags.append(CudaFlags(GPU, self.module))
        with ops.use_kernel(default_kernel()):  # on a GPU's machine the CPU's own is chosen for it
            return InPlaceAttention(self.flags[-1])

    def note_slab(self, init):
        def noted(tier, *args, **knobs):
            init(tier, *args, **knobs)
            self.slabs.append(tier.slab)

        return noted


def unpinned_zeros(*size: object, zeros=torch.zeros, **knobs: object) -> torch.Tensor:
    """`torch.zeros` where nothing can be pinned."""
    knobs.pop("pin_memory", None)
    return zeros(*size, **knobs)


@contextmanager
def fake_gpu(has_core: bool = True) -> Iterator[FakeGpu]:
    """Caches inside the `with` take the CPU for a GPU; `has_core`: with the CUDA core, emulated."""
    gpu = FakeGpu(emulated.core().module if has_core else None)
    with ExitStack() as stack:
        for where, name, fake in (
            (torch.cuda, "Stream", FakeStream),
            (torch.cuda, "Event", FakeEvent),
            (torch.cuda, "current_stream", lambda _device: gpu.stream),
            (torch.cuda, "synchronize", lambda _device: gpu.stream.synchronize()),
            (torch, "zeros", unpinned_zeros),
            (DeviceTier, "__init__", gpu.note_slab(DeviceTier.__init__)),
        ):
            stack.enter_context(patch.object(where, name, fake))
        stack.enter_context(patch.dict(Device.registry, cpu=gpu.kind()))
        stack.enter_context(patch("torch.cuda.stream", lambda _stream: ExitStack()))
        if has_core:
            stack.enter_context(ops.use_kernel(emulated.kernel()))
        yield gpu
